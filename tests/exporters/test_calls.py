"""What a call may look like: any names, `*args`, constants, and outputs put together in any way come back as they went."""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import bwcache_compile as bw
from tests.exporters.helpers import CONFIG
from tests.models import OneStream


class Mode(enum.IntEnum):
    PLAIN = 0
    TURNED = 1


class Odd(OneStream):
    """Takes and returns what the graphs have names of their own for, and a good deal else."""

    def forward(
        self, x: Tensor, t: Tensor, step: Tensor, *more: Tensor, policy_threshold: Tensor, cache_in_output_0: float, mode: Mode
    ) -> Any:
        y = super().forward(x + sum(more), t * step) * policy_threshold * cache_in_output_0
        y = -y if mode == Mode.TURNED else y
        return {"indicator": y, "x": x, "none": None, "count": 3, "parts": [t, (y, self.head.weight)], "cache_out.output_0": y + 1}


def test_a_call_keeps_its_form(tmp_path: Path) -> None:
    model, half = Odd(depth=2).eval(), torch.ones(1, dtype=torch.bfloat16)
    keywords = {"policy_threshold": torch.tensor([0.5]), "cache_in_output_0": 1.5, "mode": Mode.TURNED}
    args = (*model.example(), torch.tensor([2.0]), torch.ones(1), half)
    config = dataclasses.replace(CONFIG, calls_per_step=2)
    cached = bw.transform(model, config, example_args=args, example_kwargs=keywords)
    manifest = bw.export(cached, tmp_path / "bundle", guarded=True)
    assert [entry.name for entry in manifest.inputs] == ["x", "t", "step.in", "more_0", "more_1", "policy_threshold"]
    assert manifest.self_check["steps"] == "##..#."
    for guarded in (False, True):
        session = bw.load(tmp_path / "bundle", guarded=guarded)
        for _ in range(6):
            expected, spec = pytree.tree_flatten(cached(*args, **keywords))
            actual, actual_spec = pytree.tree_flatten(dict(session(*args, **keywords)))
            assert actual_spec == spec
            for want, got in zip(expected, actual, strict=True):
                if isinstance(want, Tensor):
                    torch.testing.assert_close(torch.from_numpy(got), want.detach(), rtol=0, atol=1e-5)
                else:
                    assert got == want
        assert str(session.report()) == str(cached.report())
        cached.reset()
        with pytest.raises(bw.StateError, match="mode is True, but the bundle was exported for 1"):
            session(*args, **{**keywords, "mode": True})


class Task(enum.Enum):
    VIDEO = "video"
    IMAGE = (1, 1)


class Tasked(OneStream):
    """Takes a member of an enum, as original repositories do."""

    def forward(self, x: Tensor, t: Tensor, task: Task) -> Tensor:
        return super().forward(x if task is Task.VIDEO else -x, t)


@pytest.mark.parametrize("task", list(Task))
def test_a_member_of_an_enum_is_held_by_its_value_or_its_name(tmp_path: Path, task: Task) -> None:
    model = Tasked(depth=2).eval()
    cached = bw.transform(model, CONFIG, example_args=(*model.example(), task))
    manifest = bw.export(cached, tmp_path / "bundle", format="pt2")
    held = {Task.VIDEO: "video", Task.IMAGE: "IMAGE"}[task]
    assert [entry.value for entry in manifest.constants] == [held]
    session = bw.load(tmp_path / "bundle", backend="torch", allow_code=True)
    for given in (task, held):
        assert torch.equal(session(*model.example(), given), model(*model.example(), task))
        session.reset()
    other = next(member for member in Task if member is not task)
    with pytest.raises(bw.StateError, match=rf"task is .*{other.name}.*, but the bundle was exported for '{held}'"):
        session(*model.example(), other)


@dataclasses.dataclass
class Output:
    sample: Tensor
    aux: Tensor | None = None


torch.export.register_dataclass(Output)


class Structured(OneStream):
    """Returns a dataclass; torch leaves out the field that is None."""

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return Output(super().forward(x, t))


def test_a_dataclass_may_have_fields_that_are_none(tmp_path: Path) -> None:
    model = Structured(depth=2).eval()
    bw.export(bw.transform(model, CONFIG, example_args=model.example()), tmp_path / "bundle", format="pt2")
    returned = bw.load(tmp_path / "bundle", backend="torch", allow_code=True)(*model.example())
    assert torch.equal(returned.sample, model(*model.example()).sample)
    assert returned.aux is None


class Styled(OneStream):
    """Looks up a style in a table of one row."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.styles = torch.nn.Embedding(1, 4)

    def forward(self, x: Tensor, t: Tensor, style: Tensor, mask: Tensor) -> Tensor:
        return super().forward((x + self.styles(style).unsqueeze(1)) * mask.unsqueeze(-1), t)


def test_the_check_draws_indices_that_the_model_has(tmp_path: Path) -> None:
    model, (x, t) = Styled().eval(), OneStream().example()
    call = (x, t, torch.zeros(len(x), dtype=torch.int64), torch.arange(x.shape[1]).expand(x.shape[:2]) < 4)
    cached = bw.transform(model, CONFIG, example_args=call)
    bw.export(cached, tmp_path / "bundle")
    with torch.no_grad():
        assert np.abs(bw.load(tmp_path / "bundle")(*call) - model(*call).numpy()).max() < 1e-5
