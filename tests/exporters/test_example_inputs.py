"""The exporter checks what it wrote with inputs like those of the capture: masks, padded masks, indices, numbers in their range."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bwcache_compile as bw
from bwcache_compile.bundle.session import Session
from bwcache_compile.ir.examples import BUDGET, Example, input_at, keep_examples
from tests.exporters.helpers import CONFIG
from tests.models import OneStream, noise


class Masked(OneStream):
    """Looks rows up in a table, weights tokens by a float mask and divides by its sum, and hides keys by flags."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.table = nn.Embedding(5, 4)

    def forward(self, x: Tensor, t: Tensor, rows: Tensor, weight: Tensor, seen: Tensor) -> Tensor:
        text = self.table(rows)
        mean = (text * weight.unsqueeze(-1)).sum(1, keepdim=True) / weight.sum(1).view(-1, 1, 1)
        scores = (x @ text.transpose(1, 2)).masked_fill(~seen.unsqueeze(1), float("-inf"))
        return super().forward(x + mean + scores.softmax(-1) @ text, t)


def example() -> tuple[Tensor, ...]:
    weight = torch.ones(1, 8)
    weight[:, 6:] = 0
    return (*OneStream().example(), torch.tensor([[4, 3, 2, 1, 0, 4, 2, 3]]), weight, torch.ones(1, 8, dtype=torch.bool))


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return what the check hands to sessions from now on."""
    given: list[dict[str, Any]] = []
    run = Session.run_flat
    monkeypatch.setattr(Session, "run_flat", lambda self, inputs: (given.append(inputs), run(self, inputs))[1])
    return given


def test_the_check_uses_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args, given = example(), recorded(monkeypatch)
    report = bw.export(bw.transform(Masked().eval(), CONFIG, example_args=args), tmp_path / "bundle").self_check
    assert report["largest_error"] < 1e-5
    assert report["padded_masks"] is True
    for inputs in given:
        assert np.array_equal(inputs["rows"], args[2].numpy())
        assert set(np.unique(inputs["weight"])) == {0, 1}
    masks = [inputs["seen"] for inputs in given]
    assert any(mask.all() for mask in masks)
    assert any(mask[:, :6].all() and not mask[:, 6:].any() for mask in masks)
    run = given[:6]
    assert all(np.abs(b["x"] - a["x"]).max() > 1e-4 and (b["t"] < a["t"]).all() for a, b in itertools.pairwise(run))
    assert np.array_equal(run[0]["x"], args[0].numpy())


class Packed(OneStream):
    """Works on as many tokens as a mask has ones."""

    def forward(self, x: Tensor, t: Tensor, seen: Tensor) -> Tensor:
        return super().forward(x[:, seen.nonzero().flatten()], t)


def test_a_graph_for_one_number_of_ones_is_not_checked_with_others(tmp_path: Path) -> None:
    seen = torch.tensor([True, True, False, True, True, True])
    cached = bw.transform(Packed(depth=2).eval(), CONFIG, example_args=(*OneStream().example(), seen))
    assert bw.export(cached, tmp_path / "bundle").self_check["largest_error"] < 1e-5


def test_what_is_kept_of_examples() -> None:
    large = torch.arange(BUDGET, dtype=torch.int64).reshape(2, -1)
    kept = keep_examples(("a", "b", "c", "d"), (large, torch.zeros(2, 3, 4), 3, torch.ones(2, device="meta")))
    assert set(kept) == {"a", "b"}
    assert kept["b"].complete
    assert not kept["a"].complete
    assert kept["a"].values.numel() <= 4096
    drawn = input_at(kept["a"], (2, 100), torch.int64, 0, torch.Generator().manual_seed(0))
    assert drawn.shape == (2, 100)
    assert 0 <= int(drawn.min()) <= int(drawn.max()) < BUDGET


@pytest.mark.parametrize(("values", "kind"), [
    (torch.tensor([True]), "mask"),
    (torch.tensor([[1, 1, 0]]), "mask"),
    (torch.tensor([[0, 0, 0]]), "whole"),
    (torch.tensor([1, 0]), "whole"),
    (torch.tensor([[1.0, 0.0]]), "mask"),
    (torch.tensor([[0.0, float("-inf")]]), "mask"),
    (torch.zeros(2, 3, 4), "values"),
    (torch.tensor([999.0]), "time"),
    (noise("x", 0, 2, 3, 4), "values"),
    (torch.polar(torch.ones(2, 2), torch.ones(2, 2)), "values"),
])  # fmt: skip
def test_kinds_of_inputs(values: Tensor, kind: str) -> None:
    example = Example(values, True, values.dim())
    assert example.kind == kind
    first, second = (input_at(example, values.shape, values.dtype, step, torch.Generator().manual_seed(0)) for step in (0, 1))
    assert torch.equal(first, second) == (kind in ("mask", "whole"))
    if values.any():
        assert torch.equal(first, values)
    wider = input_at(example, [2 * size for size in values.shape], values.dtype, 0, torch.Generator().manual_seed(0), padded=True)
    assert wider.shape == tuple(2 * size for size in values.shape)
