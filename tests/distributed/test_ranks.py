"""Ranks that run one model together compute and reuse the same steps, those of one process."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import bwcache_compile as bw
from tests.distributed.models import KINDS
from tests.distributed.ranks import run

STEPS = 30
MEASURED: dict[str, Any] = {"policy": "schedule", "threshold": 0.2, "reuse_interval": 2, "num_steps": STEPS, "indicator_tokens": "all"}
MASK = tuple(int(step > 1 and step % 3 != 0) for step in range(STEPS))
MASKED: dict[str, Any] = {"policy": "static", "steps_mask": MASK}
SAMPLED = {**MEASURED, "indicator_tokens": 7}
CAPTURED = (("ulysses", "whole"), ("ulysses", "region"), ("megatron", "whole"), ("wan_ulysses", "whole"), ("wan_ring", "whole"))
OPAQUE = tuple((kind, "opaque") for kind in KINDS)


@dataclasses.dataclass(frozen=True)
class Done:
    """What a rank did: its outputs, which steps it computed, and the collectives of each step over the group that decides."""

    outputs: list[Tensor]
    computed: list[bool]
    reductions: list[int]


@dataclasses.dataclass(frozen=True)
class Case:
    """One generation: which model, how it is captured and compiled, and the settings."""

    kind: str
    capture: str
    settings: str = "measured"
    backend: str = ""

    @property
    def config(self) -> dict[str, Any]:
        return {"measured": MEASURED, "masked": MASKED, "sampled": SAMPLED}[self.settings]


def generate(case: Case, group: Any) -> Done:
    """Run a generation on this rank, or without a group in this process. The model's own collectives run in another group."""
    kind = KINDS[case.kind]
    parts = dist.group.WORLD if group is not None and case.settings == "sampled" else None
    cached: Any = bw.transform(kind.model(), capture=case.capture, process_group=group, sequence_group=parts, **case.config)  # type: ignore[call-overload]
    outputs, reductions = [], []
    for step in range(STEPS):
        before = 0 if group is None else group._get_sequence_number_for_group()
        with torch.no_grad():
            out = kind.call(cached, kind.inputs(step, STEPS))
        outputs.append(getattr(out, "full_tensor", lambda out=out: out)().clone())
        reductions.append(0 if group is None else group._get_sequence_number_for_group() - before)
        if step == 0 and case.backend:
            cached.compile(backend=case.backend)
    return Done(outputs, [record.computed for record in cached.report().contexts["default"].steps], reductions)


def generate_all(cases: list[Case]) -> list[Done]:
    """Run generations one after the other."""
    return [generate(case, dist.new_group()) for case in cases]


def check(cases: list[Case], count: int, folder: Path) -> None:
    """Compare generations on several ranks with those of one process."""
    done = run(generate_all, count, folder, cases)
    for number, case in enumerate(cases):
        alone = generate(dataclasses.replace(case, backend=""), None)
        assert 0 < sum(alone.computed) < STEPS, case
        for rank in done:
            assert isinstance(rank, list), (rank, getattr(rank, "__notes__", ""))
            mine = rank[number]
            assert mine.computed == alone.computed, case
            wanted = 0 if case.settings == "masked" else 1
            assert mine.reductions == [wanted * computed for computed in mine.computed], f"{case}: one a computed step, none a reused one"
            for step, (out, want) in enumerate(zip(mine.outputs, alone.outputs, strict=True)):
                torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5, msg=lambda text, at=(case, step): f"{at}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["", "aot_eager"])
@pytest.mark.parametrize("count", [2, 4])
def test_captured_ranks_decide_as_one_process(count: int, backend: str, tmp_path: Path) -> None:
    check([Case(*what, backend=backend) for what in CAPTURED], count, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_ranks_decide_as_one_process_where_nothing_is_captured(count: int, tmp_path: Path) -> None:
    backends = [(what, backend) for what in OPAQUE for backend in ("", "aot_eager")]
    check([Case(*what, backend=backend) for what, backend in backends], count, tmp_path)
