"""outline_blocks: blocks that are alike are calls of one graph; every bit stays, and a compiler sees one region."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.fx import GraphModule

from bwcache_compile.config import CacheConfig
from bwcache_compile.ir.inline import inline_calls
from bwcache_compile.ir.outlined_block import OutlinedBlock
from bwcache_compile.ir.program import ModelProgram
from bwcache_compile.passes import outlined
from bwcache_compile.passes.outline_blocks import outline_blocks
from bwcache_compile.passes.specialize import specialize
from bwcache_compile.testing import assert_graph_diff
from tests.models import Block, OddMiddle, OneStream, Tiny, TwoStream
from tests.passes.helpers import applied, around, compute, fresh, models, planned, ready_for, same

STATIC = CacheConfig(policy="static", steps_mask=(0, 1, 0, 1, 1))


class ModulatedBlock(nn.Module):
    """Takes two views of one tensor, which no region that is compiled once may take."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x * scale + shift)))


class Modulated(OneStream):
    """Cuts the embedding of the time once, before the blocks."""

    def __init__(self, depth: int = 3, width: int = 8) -> None:
        super().__init__(depth, width)
        self.time = nn.Linear(1, 2 * width)
        self.blocks = nn.ModuleList(ModulatedBlock(width) for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, (scale, shift) = self.patch(x), self.embed(t).chunk(2, -1)
        for block in self.blocks:
            x = block(x, scale, shift)
        return self.head(x)


class SplitBlock(nn.Module):
    """Joins two streams and parts them again: it returns two views of one tensor, as Flux's single blocks do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([x, y], 1)
        both = both + self.down(torch.relu(self.up(both)))
        x, y = both.split([x.shape[1], y.shape[1]], 1)
        return x, y


class Split(OneStream):
    """Its blocks hand on two streams."""

    def __init__(self, depth: int = 4, width: int = 8) -> None:
        super().__init__(depth, width)
        self.blocks = nn.ModuleList(SplitBlock(width) for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, y = self.patch(x), self.embed(t)
        for block in self.blocks:
            x, y = block(x, y)
        return self.head(x)


class Tied(OneStream):
    """Every block multiplies by views of one tensor, as fused projections that were cut."""

    def __init__(self, depth: int = 3, width: int = 8) -> None:
        super().__init__(depth, width)
        for block in self.blocks:
            whole = torch.randn(2 * width, width)
            block.up.weight, block.down.weight = nn.Parameter(whole[:width]), nn.Parameter(whole[width:])


def finished(model: Tiny, config: CacheConfig = STATIC) -> ModelProgram:
    """Take a model through the pipeline."""
    return applied(specialize, ready_for(specialize, model, config))


def regions(program: ModelProgram) -> list[tuple[int, int]]:
    """Compile the compute graph whole with a backend that counts: per graph, the calls of regions, and how many regions there are."""
    counted = []

    def backend(module: GraphModule, _: Any) -> Any:
        calls = module.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph)
        counted.append((len(calls), len({call.args[0].target for call in calls})))
        return module.forward

    torch.compiler.reset()
    compiled = program.replace(compute=torch.compile(program.compute, backend=backend, fullgraph=True))
    with torch.no_grad():
        state = fresh(program.planned())
        assert same(compute(compiled, example(program), state, 0)[0], compute(program, example(program), state, 0)[0])
    return counted


def example(program: ModelProgram) -> tuple[Tensor, ...]:
    """Return inputs of the model."""
    values = [node.meta["val"] for node in program.captured.graph.find_nodes(op="placeholder")]
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(tuple(value.shape), generator=generator) for value in values)


def test_diff() -> None:
    program = ready_for(specialize, OneStream(depth=2), CacheConfig(policy="static", steps_mask=(0, 1)))
    assert_graph_diff(
        *around(outline_blocks, program),
        """\
@@ outline_blocks
-  mul: f32[1, 6, 8] = mul(linear, linear_1)
-  linear_2: f32[1, 6, 8] = linear(mul, blocks.0.up.weight, blocks.0.up.bias)
-  gelu: f32[1, 6, 8] = gelu(linear_2)
-  linear_3: f32[1, 6, 8] = linear(gelu, blocks.0.down.weight, blocks.0.down.bias)
-  add: f32[1, 6, 8] = add(linear, linear_3)
-  mul_1: f32[1, 6, 8] = mul(add, linear_1)
-  linear_4: f32[1, 6, 8] = linear(mul_1, blocks.1.up.weight, blocks.1.up.bias)
-  gelu_1: f32[1, 6, 8] = gelu(linear_4)
-  linear_5: f32[1, 6, 8] = linear(gelu_1, blocks.1.down.weight, blocks.1.down.bias)
-  add_1: f32[1, 6, 8] = add(add, linear_5)
-  return add_1
+  block0: (f32[1, 6, 8]) = call(block0, linear, linear_1, blocks.0.up.weight, blocks.0.up.bias, blocks.0.down.weight, blocks.0.down.bias)
+    linear: f32[1, 6, 8] = input
+    linear_1: f32[1, 1, 8] = input
+    blocks_0_up_weight: f32[8, 8] = input
+    blocks_0_up_bias: f32[8] = input
+    blocks_0_down_weight: f32[8, 8] = input
+    blocks_0_down_bias: f32[8] = input
+    mul: f32[1, 6, 8] = mul(linear, linear_1)
+    linear_2: f32[1, 6, 8] = linear(mul, blocks_0_up_weight, blocks_0_up_bias)
+    gelu: f32[1, 6, 8] = gelu(linear_2)
+    linear_3: f32[1, 6, 8] = linear(gelu, blocks_0_down_weight, blocks_0_down_bias)
+    add: f32[1, 6, 8] = add(linear, linear_3)
+    return add
+  add_2: f32[1, 6, 8] = getitem(block0, 0)
+  block0_1: (f32[1, 6, 8]) = call(block0, add_2, linear_1, blocks.1.up.weight, blocks.1.up.bias, blocks.1.down.weight, blocks.1.down.bias)
+    linear: f32[1, 6, 8] = input
+    linear_1: f32[1, 1, 8] = input
+    blocks_0_up_weight: f32[8, 8] = input
+    blocks_0_up_bias: f32[8] = input
+    blocks_0_down_weight: f32[8, 8] = input
+    blocks_0_down_bias: f32[8] = input
+    mul: f32[1, 6, 8] = mul(linear, linear_1)
+    linear_2: f32[1, 6, 8] = linear(mul, blocks_0_up_weight, blocks_0_up_bias)
+    gelu: f32[1, 6, 8] = gelu(linear_2)
+    linear_3: f32[1, 6, 8] = linear(gelu, blocks_0_down_weight, blocks_0_down_bias)
+    add: f32[1, 6, 8] = add(linear, linear_3)
+    return add
+  add_3: f32[1, 6, 8] = getitem(block0_1, 0)
+  return add_3""",
        name="outline_blocks",
    )


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (OneStream(depth=5), (5, 1)),
        (TwoStream(double=2, single=3), (5, 2)),
        (OddMiddle(), (2, 1)),
        (Modulated(depth=3), (3, 1)),
        (Split(depth=5), (3, 1)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_a_compiler_sees_one_region_for_each_kind_of_block(model: Tiny, expected: tuple[int, int]) -> None:
    assert regions(outlined(finished(model))) == [expected]


def test_two_kinds_of_blocks_side_by_side() -> None:
    """What a block of the second kind reads was replaced when those of the first were."""
    model = OneStream()
    model.blocks = nn.ModuleList(Block(8, inner) for inner in (8, 8, 16, 16))
    assert regions(outlined(finished(model))) == [(4, 2)]


@pytest.mark.parametrize(
    ("model", "expected"),
    [(OneStream(depth=5), (5, 1)), (OddMiddle(), (3, 2)), (Modulated(depth=3), (3, 1)), (Tied(), (3, 1))],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_regional_outlines_every_block(model: Tiny, expected: tuple[int, int]) -> None:
    """A block that is like no other, and one that shares memory with what is around it, too."""
    program, count, kinds = outlined(finished(model), regional=True), *expected
    blocks = [inner for inner in program.compute.modules() if isinstance(inner, OutlinedBlock)]
    calls = [n for m in program.compute.modules() if isinstance(m, GraphModule) for n in m.graph.find_nodes(op="call_module")]
    assert (sum("bwcache_block" in str(call.target) for call in calls), len(blocks)) == (count, kinds)
    state = fresh(program.planned())
    with torch.no_grad():
        assert same(compute(program, example(program), state, 0)[0], compute(finished(model), example(program), state, 0)[0])


def test_the_measured_rows_are_taken_outside() -> None:
    program = finished(OneStream(depth=4), CacheConfig(num_steps=4, indicator_tokens=3))
    assert regions(outlined(program)) == [(4, 1)]


def test_the_program_itself_stays_flat() -> None:
    program = finished(OneStream())
    before = str(program.compute.get_submodule("bwcache_region").graph)
    made = outlined(program)
    assert str(program.compute.get_submodule("bwcache_region").graph) == before
    assert made.reuse is program.reuse
    assert [m for m, _ in made.compute.named_modules() if m.endswith("block0")] == ["bwcache_region.bwcache_block0"]
    weights = dict(inline_calls(made.compute).attributes)
    assert all(weights[name] is value for name, value in inline_calls(program.compute).attributes.items() if name in weights)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (OddMiddle(), "blocks.1 of OddMiddle is compiled for itself: no other block is like it"),
        (Tied(), "blocks.0 of Tied is compiled for itself: two of its weights share memory"),
    ],
    ids=["unlike", "tied"],
)
def test_the_log_says_which_blocks_stay_and_why(model: Tiny, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "bwcache_compile"):
        outlined(finished(model))
    assert reason in caplog.messages


def test_a_second_run_changes_nothing() -> None:
    program = outlined(finished(OneStream()))
    assert not outline_blocks(program).modified


@settings(max_examples=5, deadline=None)
@given(models())
def test_every_bit_stays(model: Tiny) -> None:
    program = finished(model, CacheConfig(num_steps=4, indicator_tokens=3))
    made = outlined(program)
    inputs, state = example(program), fresh(program.planned())
    with torch.no_grad():
        for step in range(2):
            expected, following = compute(program, inputs, state, step)
            outputs, ours = compute(made, inputs, state, step)
            assert same(outputs, expected)
            assert same(list(ours.values()), list(following.values()))
            state = following


def test_planned_alone_is_left_alone() -> None:
    """Before the region is split off, no operator is marked as a block's."""
    assert not outline_blocks(planned(OneStream())).modified
