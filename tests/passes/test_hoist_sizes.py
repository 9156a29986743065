"""Dynamic sizes are worked out once, before the blocks, so that the blocks look alike and none hands a size on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from bwcache_compile import passes
from bwcache_compile.capture.capture import capture
from bwcache_compile.config import CacheConfig
from bwcache_compile.ir.edit import as_graph
from bwcache_compile.ir.graph_text import format_graph, snapshot
from bwcache_compile.ir.program import ModelProgram
from bwcache_compile.ir.verify import verify
from bwcache_compile.passes.canonicalize import canonicalize
from bwcache_compile.passes.hoist_sizes import hoist_sizes
from bwcache_compile.policies.sampling import sampled_tokens
from bwcache_compile.testing import assert_graph_diff
from tests.models import OneStream, noise


class Folded(OneStream):
    """Reads sizes inside its blocks, and after them."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, temb = self.patch(x), self.embed(t)
        for block in self.blocks:
            x = block(x.reshape(x.shape[0] * x.shape[1], 8).reshape(x.shape), temb)
        return self.head(x).reshape(x.shape[0] * x.shape[1], -1)


class HalvedBlindly(Folded):
    """Leaves it to the exporter to find out that a channel count is what it was: it is arithmetic that gives eight."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, temb = self.patch(x), self.embed(t)
        for block in self.blocks:
            x = block(x.reshape(x.shape[0], x.shape[1] // 2, -1).reshape(x.shape), temb)
        return self.head(x)


def inputs(batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    return noise("x", 0, batch, tokens, 4), torch.full((batch,), 0.5)


def folded(kind: type[Folded] = Folded) -> ModelProgram:
    program = capture(kind(depth=2).eval().requires_grad_(False), inputs(3, 8), {}, "auto")
    return canonicalize(program).program


def is_size(node: Node) -> bool:
    return node.op == "call_function" and isinstance(node.meta.get("val"), torch.SymInt)


def test_diff() -> None:
    program = folded()
    before = snapshot(program.compute)
    assert hoist_sizes(program).modified
    assert_graph_diff(
        before,
        program.compute,
        """\
@@ hoist_sizes
-sym_size_int_5: s27 = sym_size(x, 1)
-sym_size_int_7: s13 = sym_size(t, 0)
+sym_size_int: s27 = sym_size(x, 1)
+sym_size_int_8: s13 = sym_size(x, 0)
+mul_4: s13*s27 = mul(sym_size_int_8, sym_size_int)
-mul: s13*s27 = mul(sym_size_int_7, sym_size_int_5)
-reshape: f32[s13*s27, 8] = reshape(linear, [mul, 8])
-reshape_1: f32[s13, s27, 8] = reshape(reshape, [sym_size_int_7, sym_size_int_5, 8])
+reshape: f32[s13*s27, 8] = reshape(linear, [mul_4, 8])
+reshape_1: f32[s13, s27, 8] = reshape(reshape, [sym_size_int_8, sym_size_int, 8])
-reshape_2: f32[s13*s27, 8] = reshape(add, [mul, 8])
-reshape_3: f32[s13, s27, 8] = reshape(reshape_2, [sym_size_int_7, sym_size_int_5, 8])
+reshape_2: f32[s13*s27, 8] = reshape(add, [mul_4, 8])
+reshape_3: f32[s13, s27, 8] = reshape(reshape_2, [sym_size_int_8, sym_size_int, 8])
-reshape_4: f32[s13*s27, 4] = reshape(linear_6, [mul, -1])
+reshape_4: f32[s13*s27, 4] = reshape(linear_6, [mul_4, -1])""",
        name="hoist_sizes",
    )


def test_sizes_stand_before_tensors_and_the_numbers_are_the_models() -> None:
    program = hoist_sizes(folded()).program
    verify(program, "hoist_sizes")
    program.compute.recompile()
    kinds = [is_size(node) for node in program.compute.graph.nodes if node.op == "call_function"]
    assert kinds == sorted(kinds, reverse=True)
    for batch, tokens in ((3, 8), (2, 6), (5, 12)):
        x, t = inputs(batch, tokens)
        with torch.no_grad():
            assert torch.equal(program.compute(x, t)[0], Folded(depth=2).eval()(x, t))


def test_a_second_run_changes_nothing() -> None:
    program = hoist_sizes(folded()).program
    before = format_graph(program.compute)
    assert not hoist_sizes(program).modified
    assert format_graph(program.compute) == before


def test_fixed_sizes_leave_nothing_to_do() -> None:
    program = canonicalize(capture(Folded(depth=2).eval(), inputs(3, 8), {})).program
    assert not hoist_sizes(program).modified


@pytest.mark.parametrize("kind", [Folded, HalvedBlindly])
def test_no_block_hands_a_size_on(kind: type[Folded]) -> None:
    program = passes.build(folded(kind), CacheConfig(num_steps=4))
    (region,) = program.planned().regions
    values = {node.name: node.meta["val"] for node in program.captured.graph.nodes if "val" in node.meta}
    assert all(isinstance(values[name], Tensor) for name in region.outputs)


def sampler(stride: int, block: int) -> Callable[[Any], Tensor]:
    return lambda count: sampled_tokens(count, stride, block)


def test_the_same_tokens_are_sampled_whether_sizes_are_open_or_not() -> None:
    program = folded()
    count = next(node.meta["val"].shape[1] for node in program.compute.graph.nodes if node.op == "placeholder")
    for stride in (1, 3, 32):
        for block in (0, 1, 7):
            traced = as_graph(sampler(stride, block), [count])
            for tokens in (2, 3, 31, 32, 33, 64, 100, 4097):
                assert torch.equal(traced(tokens), sampled_tokens(tokens, stride, block)), (stride, block, tokens)
