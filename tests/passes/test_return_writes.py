"""return_writes: `x += y` becomes `x = x + y` where nobody can tell."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

import bwcache_compile as bw
from bwcache_compile.graph_text import diff_graphs
from bwcache_compile.passes.canonicalize import canonicalize
from bwcache_compile.passes.return_writes import return_writes
from tests.models import BufferWriter, Exposed, InPlace, InPlaceResidual, OneStream, Tiny, captured
from tests.passes.helpers import eager, run, same, text


def test_a_block_that_adds_to_its_input() -> None:
    program = canonicalize(captured(InPlaceResidual())).program
    before = text(program)
    result = return_writes(program)
    assert result.modified
    assert_expected_inline(
        diff_graphs(before, text(result.program), "return_writes"),
        """\
@@ return_writes
-add_: f32[1, 6, 8] = add_(linear, linear_3)
+add_: f32[1, 6, 8] = add(linear, linear_3)
-add__1: f32[1, 6, 8] = add_(add_, linear_5)
+add__1: f32[1, 6, 8] = add(add_, linear_5)""",
    )
    assert not return_writes(program).modified


class Twice(OneStream):
    """Writes twice, reads a view between, and returns the name of the value before the writes."""

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        y = self.patch(x)
        first = y
        y += 1
        mean = y[:, :2].mean()
        y *= mean
        return super().forward(x, t), first


class KeptView(OneStream):
    """Reads a view that was made before a write."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = self.patch(x)
        head = y[:, :2]
        y += 1
        return super().forward(x, t) + head.mean()


class PartWritten(OneStream):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = self.patch(x)
        y[:, :2] += 1
        return super().forward(x, t) + y.mean()


class Narrowing(OneStream):
    """A write that casts: by value the sum would be of another dtype."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = self.patch(x).to(torch.bfloat16)
        y += torch.ones(8)
        return super().forward(x, t) + y.float().mean()


@pytest.mark.parametrize(
    ("model", "modified"),
    [(InPlaceResidual(), True), (Twice(), True), (Exposed(), True), (KeptView(), False), (PartWritten(), False), (Narrowing(), False),
     (BufferWriter(), False), (InPlace(), False)],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_the_numbers_stay(model: Tiny, modified: bool) -> None:
    program = canonicalize(captured(model)).program
    assert return_writes(program).modified is modified
    program.compute.recompile()
    inputs = model.example(step=1)
    assert same(run(program, *inputs)[: len(eager(model, *inputs))], eager(model, *inputs))


def test_blocks_that_add_in_place_are_cached() -> None:
    model = InPlaceResidual(depth=3).eval()
    cached = bw.transform(model, bw.CacheConfig(policy="static", steps_mask=(0, 1, 0)))
    with torch.no_grad():
        outputs = [cached(*model.example(step=step)) for step in range(3)]
        assert torch.equal(outputs[0], model(*model.example(step=0)))
        assert torch.equal(outputs[1], outputs[0]), "nothing but the blocks' output reaches the end"
        assert torch.equal(outputs[2], model(*model.example(step=2)))
