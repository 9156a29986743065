"""insert_indicator: how far each measured block has moved, next to a program that computes the same bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Interpreter, Node

from bwcache_compile.config import CacheConfig
from bwcache_compile.ir.program import ModelProgram
from bwcache_compile.passes import run_pipeline
from bwcache_compile.passes.insert_cache import insert_cache
from bwcache_compile.passes.insert_indicator import insert_indicator
from bwcache_compile.passes.split_region import split_region
from bwcache_compile.policies.sampling import sampled_tokens
from bwcache_compile.testing import assert_graph_diff
from tests.models import Exposed, InPlace, Interleaved, OneStream, Tiny, TwoStream
from tests.passes.helpers import applied, around, eager, fill_buffers, models, planned, ready_for, run, same, text


def graphs(model: Tiny, depth: int, **settings: object) -> tuple[str, str]:
    return around(insert_indicator, ready_for(insert_indicator, model, CacheConfig(**{"num_steps": 4, **settings})), depth)


def test_diff() -> None:
    assert_graph_diff(
        *graphs(OneStream(depth=2), 8, indicator_tokens=2, indicator_blocks=1),
        """\
@@ insert_indicator
-region: (f32[1, 6, 8]) = call(region, linear, linear_1)
+region: (f32[1, 6, 8], f32[3, 8]) = call(region, linear, linear_1)
-  return add_1
+  rows_0: f32[6, 8] = reshape(add_1, [6, 8])
+  sample_0: f32[3, 8] = index_select(rows_0, 0, tokens_0)
+  return add_1, sample_0
+feature_0: f32[3, 8] = getitem(region, 1)
+change: f32[1] = call(indicator, feature_0, cache.reference_0)
+  arg0_1: f32[3, 8] = input
+  arg1_1: f32[3, 8] = input
+  sub: f32[3, 8] = sub(arg0_1, arg1_1)
+  abs_1: f32[3, 8] = abs(sub)
+  sum_1: f32[] = sum(abs_1)
+  abs_2: f32[3, 8] = abs(arg1_1)
+  sum_2: f32[] = sum(abs_2)
+  div: f32[] = div(sum_1, sum_2)
+  stack: f32[1] = stack([div])
+  return stack
+copy__default_1: f32[3, 8] = copy_(cache.reference_0, feature_0)""",
        name="insert_indicator",
    )


def test_every_token_of_every_block() -> None:
    assert_graph_diff(
        *graphs(OneStream(depth=2), 0, indicator_tokens="all"),
        """\
@@ insert_indicator
-region: (f32[1, 6, 8]) = call(region, linear, linear_1)
+region: (f32[1, 6, 8], f32[1, 6, 8], f32[1, 6, 8]) = call(region, linear, linear_1)
+feature_0: f32[1, 6, 8] = getitem(region, 1)
+feature_1: f32[1, 6, 8] = getitem(region, 2)
+change: f32[2] = call(indicator, feature_0, feature_1, cache.reference_0, cache.reference_1)
+copy__default_1: f32[1, 6, 8] = copy_(cache.reference_0, feature_0)
+copy__default_2: f32[1, 6, 8] = copy_(cache.reference_1, feature_1)""",
        name="insert_indicator",
    )


def test_video_rows_alone() -> None:
    after = applied(insert_indicator, ready_for(insert_indicator, TwoStream(), CacheConfig(num_steps=4, indicator_tokens=3)))
    region = {node.name: node for node in after.compute.get_submodule("bwcache_region").graph.nodes}
    chain = [[name for name in region if name.endswith(f"_{i}") and name.startswith(("stream", "rows", "sample"))] for i in range(4)]
    assert chain == [["rows_0", "sample_0"], ["rows_1", "sample_1"], ["stream_2", "rows_2", "sample_2"], ["stream_3", "rows_3", "sample_3"]]
    assert region["stream_3"].args[1:] == (1, 2, 8)


def test_static_measures_nothing() -> None:
    program = ready_for(insert_indicator, OneStream(), CacheConfig(policy="static", steps_mask=(0, 1)))
    before = text(program)
    result = insert_indicator(program)
    assert not result.modified
    assert text(result.program) == before


class Recorder(Interpreter):
    """Runs the flat program and keeps every value as it was when it was computed."""

    def run_node(self, n: Node) -> object:
        value = super().run_node(n)
        self.kept = {**getattr(self, "kept", {}), n.name: value.clone() if isinstance(value, Tensor) else value}
        return value


def expected_samples(program: ModelProgram, *args: Tensor) -> list[Tensor]:
    """Work out the measured rows from the flat program of a plan."""
    recorder = Recorder(program.compute)
    recorder.run(*(arg.clone() for arg in args))
    samples = []
    for i, measured in enumerate(program.planned().measured):
        value = recorder.kept[measured.node]
        if measured.token_range is not None:
            value = value[:, measured.token_range[0] : measured.token_range[1]]
        if measured.stride is not None:
            rows = value.reshape(-1, value.shape[-1])
            value = rows[sampled_tokens(len(rows), measured.stride, i)]
        samples.append(value)
    return samples


def check_numbers(model: Tiny, config: CacheConfig) -> None:
    flat = planned(model, config)
    program = applied(insert_indicator, run_pipeline(flat.copy(), (split_region, insert_cache)))
    fill_buffers(program)
    holder = program.compute.get_submodule("bwcache_cache")
    measured, changes = [], []
    program.compute.get_submodule("bwcache_indicator").register_forward_hook(lambda _, inputs, output: changes.append(output.clone()))
    for step in range(2):
        args = model.example(step=step)
        assert same(run(program, *args), eager(model, *args))
        measured.append(expected_samples(flat, *args))
        assert same([getattr(holder, f"reference_{i}") for i in range(len(measured[-1]))], measured[-1])
    old, new = measured
    assert not changes[0].isfinite().any(), "against a fresh state nothing counts as unchanged"
    ratios = [(b.double() - a.double()).abs().sum() / a.double().abs().sum() for a, b in zip(old, new, strict=True)]
    torch.testing.assert_close(changes[1].double(), torch.stack(ratios), rtol=1e-5, atol=0)
    assert (changes[1] > 0).all()


class Scaled(OneStream):
    """Scales each block's output in place before the next block reads it."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, temb = self.patch(x), self.embed(t)
        for block in self.blocks:
            x = block(x, temb)
            x.mul_(3)
        return self.head(x)


@pytest.mark.parametrize("model", [OneStream(), TwoStream(), InPlace(), Interleaved(), Exposed(), Scaled()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("tokens", [2, "all"])
def test_numbers(model: Tiny, tokens: int | str) -> None:
    check_numbers(model, CacheConfig(num_steps=4, indicator_tokens=tokens))


@settings(max_examples=10, deadline=None)
@given(models(), st.sampled_from([1, 3, 5, 1000, "all"]), st.sampled_from([1, 2, "all"]))
def test_samples_and_changes(model: Tiny, tokens: int | str, blocks: int | str) -> None:
    check_numbers(model, CacheConfig(num_steps=4, indicator_tokens=tokens, indicator_blocks=blocks))
