"""insert_cache: what a reused step will need is kept, and nothing later in the step can change it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bwcache_compile.config import CacheConfig
from bwcache_compile.ir.graph_text import op_counts
from bwcache_compile.ir.program import ModelProgram
from bwcache_compile.passes.insert_cache import insert_cache
from bwcache_compile.passes.split_region import split_region
from bwcache_compile.testing import assert_graph_diff
from tests.models import Exposed, Interleaved, Numbered, OneStream, Refined, Tiny, TwoStream
from tests.passes.helpers import WAYS, applied, around, fill_buffers, models, planned, ready_for, run, same


def graphs(model: Tiny, **settings: object) -> tuple[str, str]:
    return around(insert_cache, ready_for(insert_cache, model, CacheConfig(**{"num_steps": 4, **settings})))


def test_output() -> None:
    assert_graph_diff(
        *graphs(OneStream(depth=2)),
        """\
@@ insert_cache
+copy__default: f32[1, 6, 8] = copy_(cache.output_0, region_0)""",
        name="insert_cache",
    )


def test_residual() -> None:
    assert_graph_diff(
        *graphs(OneStream(depth=2), reuse="residual"),
        """\
@@ insert_cache
+keep_0: f32[1, 6, 8] = call(keep_0, region_0, linear)
+  arg0_1: f32[1, 6, 8] = input
+  arg1_1: f32[1, 6, 8] = input
+  sub: f32[1, 6, 8] = sub(arg0_1, arg1_1)
+  return sub
+copy__default: f32[1, 6, 8] = copy_(cache.output_0, keep_0)""",
        name="insert_cache",
    )


def test_taylor() -> None:
    assert_graph_diff(
        *graphs(OneStream(depth=2), reuse="taylor"),
        """\
@@ insert_cache
+step: i64[1] = input
+copy__default: f32[1, 6, 8] = copy_(cache.previous_0, cache.output_0)
+copy__default_1: f32[1, 6, 8] = copy_(cache.output_0, region_0)
+keep_shared: f32[2, 2] = call(keep_shared, t, step, cache.times)
+  time_1: f32[1] = input
+  step_1: i64[1] = input
+  kept_times_1: f32[2, 2] = input
+  view: f32[1] = view(time_1, [-1])
+  slice_1: f32[1] = slice(view, 0, 0, 1)
+  _to_copy: f32[1] = _to_copy(step_1, dtype=torch.float32)
+  cat: f32[2] = cat([slice_1, _to_copy])
+  view_1: f32[1, 2] = view(cat, [1, 2])
+  slice_2: f32[1, 2] = slice(kept_times_1, 0, 0, -1)
+  cat_1: f32[2, 2] = cat([view_1, slice_2])
+  return cat_1
+copy__default_2: f32[2, 2] = copy_(cache.times, keep_shared)""",
        name="insert_cache",
    )


def test_two_outputs_keep_their_order() -> None:
    assert_graph_diff(
        *graphs(TwoStream(), compute_last=2),
        """\
@@ insert_cache
+copy__default: f32[1, 6, 8] = copy_(cache.output_0, region_0)
+copy__default_1: f32[1, 2, 8] = copy_(cache.output_1, region_1)""",
        name="insert_cache",
    )


def test_what_the_epilogue_changes_is_copied_first() -> None:
    assert_graph_diff(
        *graphs(Numbered(Exposed(depth=2))),
        """\
@@ insert_cache
+clone_default: f32[1, 6, 8] = clone(region_0, memory_format=torch.preserve_format)
+copy__default: f32[1, 6, 8] = copy_(cache.output_0, clone_default)""",
        name="insert_cache",
    )


class Returned(OneStream):
    """Returns a view of the hidden state: the caller may write to it before the next step."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, temb = self.patch(x), self.embed(t)
        for block in self.blocks:
            x = block(x, temb)
        return x[:, 1:]


class Written(OneStream):
    """Writes to the hidden state after the blocks, and returns something else."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, temb = self.patch(x), self.embed(t)
        for block in self.blocks:
            x = block(x, temb)
        return self.head(x.mul_(2))


class MixerBlock(nn.Module):
    """Ends with a transpose: its output lies in memory in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.channels, self.tokens = nn.Linear(8, 8), nn.Linear(6, 6)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return self.tokens(self.channels(x * temb).transpose(1, 2)).transpose(1, 2)


class Strided(OneStream):
    def __init__(self) -> None:
        super().__init__(depth=2)
        self.blocks = nn.ModuleList(MixerBlock() for _ in range(2))


class HalvedBlock(nn.Module):
    """Returns two views of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 8)

    def forward(self, left: Tensor, right: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        left, right = self.down(self.up((left + right) * temb)).chunk(2, dim=-1)
        return left, right


class Halved(OneStream):
    def __init__(self) -> None:
        super().__init__(depth=2, width=4)
        self.blocks = nn.ModuleList(HalvedBlock() for _ in range(2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        left, temb = self.patch(x), self.embed(t)
        right = left
        for block in self.blocks:
            left, right = block(left, right, temb)
        return self.head(left) + self.head(right)


def test_a_slot_lies_in_memory_as_the_output_does() -> None:
    program = applied(insert_cache, ready_for(insert_cache, Strided()))
    slot = program.planned().slots[0]
    assert (slot.name, slot.example, slot.order) == ("output_0", (1, 6, 8), (0, 2, 1))
    (read,) = [node for node in program.compute.graph.find_nodes(op="get_attr") if node.target == "bwcache_cache.output_0"]
    assert read.meta["val"].stride() == (48, 1, 6)
    assert "clone" not in op_counts(program.compute), "and so it need not be copied"


@pytest.mark.parametrize("model", [Returned(), Numbered(Written()), Halved(), Numbered(Exposed())])
def test_what_may_change_or_has_gaps_is_copied(model: Tiny) -> None:
    program = applied(insert_cache, ready_for(insert_cache, model))
    writes = [node for node in program.compute.graph.nodes if node.op == "call_function" and "copy_" in str(node.target)]
    assert [str(node.args[1].target) for node in writes] == ["aten.clone.default"] * len(program.planned().regions[0].outputs)
    assert all(node.args[1].meta["val"].is_contiguous() for node in writes)


@pytest.mark.parametrize("model", [OneStream(), TwoStream(), Refined()], ids=lambda m: type(m).__name__)
def test_what_nothing_can_change_is_not_copied(model: Tiny) -> None:
    assert op_counts(applied(insert_cache, ready_for(insert_cache, model)).compute)["clone"] == 0


def watched(program: ModelProgram) -> list[tuple[Tensor, ...]]:
    """Return a list that will hold a copy of the region's inputs and one of its outputs for each run."""
    seen: list[tuple[Tensor, ...]] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
        seen.append(tuple(value.clone() for value in inputs))
        seen.append(tuple(value.clone() for value in outputs))

    program.compute.get_submodule("bwcache_region").register_forward_hook(record)
    return seen


def check_numbers(model: Tiny, reuse: str) -> None:
    config = CacheConfig(num_steps=4, reuse=reuse)
    flat = planned(model, config)
    before = applied(split_region, flat.copy())
    after = applied(insert_cache, applied(split_region, flat))
    fill_buffers(after)
    seen, plan = watched(after), after.planned()
    for step in (0, 1):
        args = model.example(step=step)
        assert same(run(after, *args, step=step), run(before, *args, step=step))
    _, first, inputs, second = seen
    slots = dict(after.compute.get_submodule("bwcache_cache").named_buffers())
    sources = (
        [inputs[plan.regions[0].inputs.index(plan.regions[0].sources[name])] for name in plan.regions[0].outputs]
        if reuse == "residual"
        else []
    )
    kept = [out - source for out, source in zip(second, sources, strict=True)] if reuse == "residual" else list(second)
    assert same([slots[f"output_{i}"] for i in range(len(kept))], kept)
    if reuse == "taylor":
        assert same([slots[f"previous_{i}"] for i in range(len(kept))], list(first))
        times = [[0.875, 1.0], [1.0, 0.0]] if plan.time_input else [[1.0, 1.0], [0.0, 0.0]]
        assert torch.equal(slots["times"], torch.tensor(times)), "time and step of the last two"


@pytest.mark.parametrize("model", [Returned(), Written(), Strided(), Halved(), Exposed(), Interleaved()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("reuse", ["output", "taylor"])
def test_numbers(model: Tiny, reuse: str) -> None:
    check_numbers(model, reuse)


class Untimed(OneStream):
    """Its time is an integer, which nothing proves to be the time."""

    def example(self, batch: int = 1, step: int = 0) -> tuple[Tensor, ...]:
        x, t = super().example(batch, step)
        return x, (8 * t).to(torch.int64)

    def embed(self, t: Tensor) -> Tensor:
        return super().embed(t.float())


def test_taylor_keeps_the_step_where_no_input_is_the_time() -> None:
    check_numbers(Untimed(), "taylor")


@settings(max_examples=10, deadline=None)
@given(st.integers(2, 4), st.sampled_from((4, 8)), st.sampled_from(WAYS))
def test_slots_hold_the_last_step(depth: int, width: int, reuse: str) -> None:
    check_numbers(OneStream(depth, width), reuse)


@settings(max_examples=10, deadline=None)
@given(models())
def test_every_output_slot_is_written_once(model: Tiny) -> None:
    program = applied(insert_cache, ready_for(insert_cache, model))
    written = [str(n.args[0].target) for n in program.compute.graph.nodes if n.op == "call_function" and "aten.copy_" in str(n.target)]
    assert written == [f"bwcache_cache.{slot.name}" for slot in program.planned().slots if slot.role == "output"]
