"""split_region: prologue, one call, epilogue; every bit stays."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bwcache_compile.config import CacheConfig
from bwcache_compile.ir.graph_text import op_counts
from bwcache_compile.ir.program import REGION_MARK, ModelProgram
from bwcache_compile.passes import find_blocks, plan_cache
from bwcache_compile.passes.split_region import split_region
from bwcache_compile.testing import assert_graph_diff
from tests.models import Exposed, Functional, InPlace, Interleaved, OneStream, Refined, Tiny, TwoStream
from tests.passes.helpers import applied, around, eager, models, planned, run, same, text


def test_diff() -> None:
    program = planned(OneStream(depth=2), CacheConfig(num_steps=4, compute_first=1))
    assert_graph_diff(
        *around(split_region, program),
        """\
@@ split_region
-mul_1: f32[1, 6, 8] = mul(add, linear_1)
-linear_4: f32[1, 6, 8] = linear(mul_1, blocks.1.up.weight, blocks.1.up.bias)
-gelu_1: f32[1, 6, 8] = gelu(linear_4)
-linear_5: f32[1, 6, 8] = linear(gelu_1, blocks.1.down.weight, blocks.1.down.bias)
-add_1: f32[1, 6, 8] = add(add, linear_5)
-linear_6: f32[1, 6, 4] = linear(add_1, head.weight, head.bias)
+region: (f32[1, 6, 8]) = call(region, add, linear_1)
+  add: f32[1, 6, 8] = input
+  linear_1: f32[1, 1, 8] = input
+  mul_1: f32[1, 6, 8] = mul(add, linear_1)
+  linear_4: f32[1, 6, 8] = linear(mul_1, blocks.1.up.weight, blocks.1.up.bias)
+  gelu_1: f32[1, 6, 8] = gelu(linear_4)
+  linear_5: f32[1, 6, 8] = linear(gelu_1, blocks.1.down.weight, blocks.1.down.bias)
+  add_1: f32[1, 6, 8] = add(add, linear_5)
+  return add_1
+region_0: f32[1, 6, 8] = getitem(region, 0)
+linear_6: f32[1, 6, 4] = linear(region_0, head.weight, head.bias)""",
        name="split_region",
    )


def test_two_outputs() -> None:
    program = planned(TwoStream(double=2, single=0), CacheConfig(num_steps=4, compute_first=1))
    assert_graph_diff(
        *around(split_region, program, 0),
        """\
@@ split_region
-mean_2: f32[1, 1, 8] = mean(add_1, [1], True)
-mean_3: f32[1, 1, 8] = mean(add_3, [1], True)
-mul_2: f32[1, 6, 8] = mul(add_1, linear_2)
-add_4: f32[1, 6, 8] = add(mul_2, mean_3)
-gelu_2: f32[1, 6, 8] = gelu(add_4)
-linear_5: f32[1, 6, 8] = linear(gelu_2, double_blocks.1.video.weight, double_blocks.1.video.bias)
-add_5: f32[1, 6, 8] = add(add_1, linear_5)
-mul_3: f32[1, 2, 8] = mul(add_3, linear_2)
-add_6: f32[1, 2, 8] = add(mul_3, mean_2)
-gelu_3: f32[1, 2, 8] = gelu(add_6)
-linear_6: f32[1, 2, 8] = linear(gelu_3, double_blocks.1.text.weight, double_blocks.1.text.bias)
-add_7: f32[1, 2, 8] = add(add_3, linear_6)
-cat: f32[1, 8, 8] = cat([add_7, add_5], 1)
+region: (f32[1, 6, 8], f32[1, 2, 8]) = call(region, add_1, add_3, linear_2)
+region_0: f32[1, 6, 8] = getitem(region, 0)
+region_1: f32[1, 2, 8] = getitem(region, 1)
+cat: f32[1, 8, 8] = cat([region_1, region_0], 1)""",
        name="split_region",
    )


class Late(OneStream):
    """Runs part of the prologue between the blocks, and scales in place what the blocks have read."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        hidden, temb = self.patch(x), self.embed(t)
        bypass = x.clone()
        for block in self.blocks:
            hidden = block(hidden, temb)
            bypass.mul_(2)
        temb.mul_(2)
        return self.head(hidden * temb) + bypass


def test_what_does_not_depend_on_the_region_runs_before_it() -> None:
    after = applied(split_region, planned(Late(depth=2)))
    assert_expected_inline(
        text(after, depth=0),
        """\
x: f32[1, 6, 4] = input
t: f32[1] = input
linear: f32[1, 6, 8] = linear(x, patch.weight, patch.bias)
view: f32[1, 1, 1] = view(t, [-1, 1, 1])
linear_1: f32[1, 1, 8] = linear(view, time.weight, time.bias)
clone: f32[1, 6, 4] = clone(x)
mul_1: f32[1, 6, 4] = mul(clone, 2)
mul_3: f32[1, 6, 4] = mul(mul_1, 2)
mul_4: f32[1, 1, 8] = mul(linear_1, 2)
region: (f32[1, 6, 8]) = call(region, linear, linear_1)
region_0: f32[1, 6, 8] = getitem(region, 0)
mul_5: f32[1, 6, 8] = mul(region_0, mul_4)
linear_6: f32[1, 6, 4] = linear(mul_5, head.weight, head.bias)
add_2: f32[1, 6, 4] = add(linear_6, mul_3)
return add_2""",
    )


def test_a_program_without_a_plan_is_refused() -> None:
    program = planned(OneStream()).replace(plan=None)
    with pytest.raises(AssertionError, match="this pass runs after plan_cache"):
        split_region(program)


class Counted(OneStream):
    """Counts its calls in a buffer, outside the blocks."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls.add_(1)
        return super().forward(x, t)


def test_a_write_outside_the_region_stays_outside() -> None:
    model = Counted()
    program = applied(split_region, planned(model))
    assert op_counts(program.compute)["copy_"] == 1, "the captured graph is functional, but for this write"
    assert not any(name.startswith("copy_") for name in region(program))
    calls = model.calls.clone()
    run(program, *model.example())
    assert torch.equal(model.calls, calls + 1)


class Skips(OneStream):
    """Projects every block's output as soon as it is there: parts of the epilogue stand between the blocks."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        hidden, temb = self.patch(x), self.embed(t)
        total = x
        for block in self.blocks:
            hidden = block(hidden, temb)
            total = total + self.head(hidden)
        return total


def region(program: ModelProgram) -> list[str]:
    return [node.name for node in program.compute.get_submodule("bwcache_region").graph.nodes if node.op == "call_function"]


MODELS = [OneStream(), TwoStream(), InPlace(), Interleaved(), Refined(), Functional(), Exposed(), Late(), Skips()]


@pytest.mark.parametrize("model", MODELS, ids=lambda m: type(m).__name__)
def test_numbers(model: Tiny) -> None:
    program = planned(model)
    before, plan = program.copy(), program.planned()
    after = applied(split_region, program)
    assert region(after) == list(plan.regions[0].nodes)
    assert op_counts(after.compute) - op_counts(before.compute) == {"getitem": len(plan.regions[0].outputs)}
    assert not op_counts(before.compute) - op_counts(after.compute)
    for step in range(2):
        assert same(run(after, *model.example(step=step)), run(before, *model.example(step=step)))


@settings(max_examples=10, deadline=None)
@given(models(), st.integers(0, 2), st.integers(0, 2))
def test_recomposes_bit_for_bit(model: Tiny, first: int, last: int) -> None:
    program = planned(model)
    search = find_blocks(program)
    first = min(first, len(search.blocks) - 1)
    last = min(last, len(search.blocks) - 1 - first)
    config = CacheConfig(num_steps=4, compute_first=first, compute_last=last)
    program = program.replace(plan=plan_cache(program, search, config))
    once = applied(split_region, program)
    inner = once.compute.get_submodule("bwcache_region")
    weights = {id(p) for p in model.parameters()}
    assert {id(p) for p in once.compute.parameters()} <= weights, "no weight is copied"
    assert all(node.meta.get(REGION_MARK) for node in inner.graph.nodes if node.op == "call_function")
    assert not any(node.meta.get(REGION_MARK) for node in once.compute.graph.nodes)
    args = model.example(step=1)
    assert same(run(once, *args), eager(model, *args))
    before = text(once)
    again = split_region(once)
    assert not again.modified
    assert text(again.program) == before
