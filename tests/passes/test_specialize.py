"""specialize: a reused step runs what is left of the model when no cached block runs."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import ConfigError, UnsupportedGraphError
from bwcache_compile.ir.graph_text import format_graph, op_counts
from bwcache_compile.ir.program import REGION_MARK, ModelProgram
from bwcache_compile.passes.specialize import specialize
from tests.models import Block, Exposed, Functional, InPlace, Interleaved, Numbered, OneStream, Refined, Tiny, TwoStream
from tests.passes.helpers import WAYS, applied, compute, eager, fresh, models, ready_for, reuse, same, text


def specialized(model: Tiny, **settings: object) -> ModelProgram:
    return applied(specialize, ready_for(specialize, model, CacheConfig(**{"num_steps": 4, **settings})))


def test_output() -> None:
    assert_expected_inline(
        format_graph(specialized(TwoStream()).reuse),
        """\
x: f32[1, 6, 4] = input
text: f32[1, 2, 5] = input
t: f32[1] = input
cache_in_output_0: f32[1, 8, 8] = input
step: i64[1] = input
slice_1: f32[1, 6, 8] = slice(cache_in_output_0, 1, 2, 9223372036854775807)
linear_11: f32[1, 6, 4] = linear(slice_1, head.weight, head.bias)
return linear_11""",
    )


def test_residual_keeps_the_source() -> None:
    assert_expected_inline(
        format_graph(specialized(OneStream(depth=2), reuse="residual").reuse),
        """\
x: f32[1, 6, 4] = input
t: f32[1] = input
cache_in_output_0: f32[1, 6, 8] = input
step: i64[1] = input
linear: f32[1, 6, 8] = linear(x, patch.weight, patch.bias)
reuse_0: f32[1, 6, 8] = call(reuse_0, linear, cache_in_output_0)
  arg0_1: f32[1, 6, 8] = input
  arg1_1: f32[1, 6, 8] = input
  add: f32[1, 6, 8] = add(arg0_1, arg1_1)
  return add
linear_6: f32[1, 6, 4] = linear(reuse_0, head.weight, head.bias)
return linear_6""",
    )


def test_taylor() -> None:
    assert_expected_inline(
        format_graph(specialized(OneStream(depth=2), reuse="taylor").reuse).replace("_times, ", "_times,\n    "),
        """\
x: f32[1, 6, 4] = input
t: f32[1] = input
cache_in_output_0: f32[1, 6, 8] = input
cache_in_previous_0: f32[1, 6, 8] = input
cache_in_times: f32[2, 2] = input
policy_weights: f32[1, 2] = input
policy_anchor_steps: f32[1, 2] = input
policy_order: i64[1] = input
policy_damping: f32[1] = input
step: i64[1] = input
reuse_0: f32[1, 6, 8] = call(reuse_0, cache_in_output_0, cache_in_previous_0, t, step, cache_in_times,
    policy_weights, policy_anchor_steps, policy_order, policy_damping)
  arg0_1: f32[1, 6, 8] = input
  arg1_1: f32[1, 6, 8] = input
  arg2_1: f32[1] = input
  arg3_1: i64[1] = input
  arg4_1: f32[2, 2] = input
  arg5_1: f32[1, 2] = input
  arg6_1: f32[1, 2] = input
  arg7_1: i64[1] = input
  arg8_1: f32[1] = input
  view: f32[1] = view(arg2_1, [-1])
  slice_1: f32[1] = slice(view, 0, 0, 1)
  clamp: i64[1] = clamp(arg3_1, None, 0)
  index: f32[1, 2] = index(arg6_1, [clamp])
  select: f32[2] = select(arg4_1, 1, 1)
  nan_to_num: f32[2] = nan_to_num(select, -1.0)
  eq: b8[1, 2] = eq(index, nan_to_num)
  all_1: b8[] = all(eq)
  index_1: f32[1, 2] = index(arg5_1, [clamp])
  view_1: f32[2] = view(index_1, [-1])
  _to_copy: f32[1] = _to_copy(arg3_1, dtype=torch.float32)
  cat: f32[2] = cat([slice_1, _to_copy])
  select_1: f32[2] = select(arg4_1, 1, 1)
  eq_1: b8[2] = eq(select_1, select_1)
  sum_1: i64[] = sum(eq_1)
  sub: i64[] = sub(sum_1, 1)
  minimum: i64[1] = minimum(arg7_1, sub)
  sub_1: i64[1] = sub(minimum, 1)
  clamp_1: i64[1] = clamp(sub_1, 0)
  cat_1: i64[2] = cat([minimum, clamp_1])
  arange: i64[2] = arange(2, device=cpu, pin_memory=False)
  view_2: i64[2, 1] = view(cat_1, [-1, 1])
  gt: b8[2, 2] = gt(arange, view_2)
  unsqueeze: b8[2, 1, 2] = unsqueeze(gt, 1)
  view_3: i64[2, 1] = view(arange, [-1, 1])
  eq_2: b8[2, 2] = eq(arange, view_3)
  bitwise_or: b8[2, 2, 2] = bitwise_or(unsqueeze, eq_2)
  sub_2: f32[2, 2] = sub(cat, arg4_1)
  unsqueeze_1: f32[2, 1, 2] = unsqueeze(arg4_1, 1)
  sub_3: f32[2, 2, 2] = sub(unsqueeze_1, arg4_1)
  div: f32[2, 2, 2] = div(sub_2, sub_3)
  unsqueeze_2: b8[2, 2, 2, 1] = unsqueeze(bitwise_or, 3)
  scalar_tensor: f32[] = scalar_tensor(1.0, dtype=torch.float32, layout=torch.strided, device=cpu)
  where: f32[2, 2, 2, 2] = where(unsqueeze_2, scalar_tensor, div)
  unsqueeze_3: b8[2, 2, 1] = unsqueeze(gt, 2)
  prod: f32[2, 2, 2] = prod(where, 2)
  scalar_tensor_1: f32[] = scalar_tensor(0.0, dtype=torch.float32, layout=torch.strided, device=cpu)
  where_1: f32[2, 2, 2] = where(unsqueeze_3, scalar_tensor_1, prod)
  select_2: f32[2, 2] = select(where_1, 0, 0)
  mul: f32[2, 2] = mul(arg8_1, select_2)
  rsub: f32[1] = rsub(arg8_1, 1)
  select_3: f32[2, 2] = select(where_1, 0, 1)
  mul_1: f32[2, 2] = mul(rsub, select_3)
  add: f32[2, 2] = add(mul, mul_1)
  select_4: f32[2] = select(add, 1, 0)
  select_5: f32[2] = select(add, 1, 1)
  sub_4: f32[2] = sub(select_4, select_4)
  eq_3: b8[2] = eq(sub_4, 0)
  all_2: b8[] = all(eq_3)
  where_2: f32[2] = where(all_2, select_4, select_5)
  where_3: f32[2] = where(all_1, view_1, where_2)
  select_6: f32[] = select(where_3, 0, 1)
  sub_5: f32[1, 6, 8] = sub(arg1_1, arg0_1)
  mul_2: f32[1, 6, 8] = mul(select_6, sub_5)
  add_1: f32[1, 6, 8] = add(arg0_1, mul_2)
  return add_1
linear_6: f32[1, 6, 4] = linear(reuse_0, head.weight, head.bias)
return linear_6""",
    )


def test_what_the_epilogue_changes_is_copied_first() -> None:
    assert_expected_inline(
        format_graph(specialized(Numbered(Exposed(depth=2))).reuse),
        """\
x: f32[1, 6, 4] = input
t: f32[1] = input
cache_in_output_0: f32[1, 6, 8] = input
step: i64[1] = input
clone_default_1: f32[1, 6, 8] = clone(cache_in_output_0)
mul_: f32[1, 6, 8] = mul_(clone_default_1, 2)
linear_6: f32[1, 6, 4] = linear(mul_, parts.0.head.weight, parts.0.head.bias)
slice_1: f32[1, 2, 8] = slice(mul_, 1, 0, 2)
return linear_6, slice_1""",
    )


def test_the_computed_step_is_left_alone() -> None:
    program = ready_for(specialize, TwoStream(), CacheConfig(num_steps=4))
    before = text(program)
    after = specialize(program).program
    assert text(after) == before
    again = specialize(after)
    assert not again.modified
    assert again.program is after


def test_blocks_outside_the_region_still_run() -> None:
    program = specialized(OneStream(depth=4), compute_first=1, compute_last=1)
    weights = [name for name, _ in program.reuse.named_parameters() if name.startswith("blocks")]
    assert weights == [f"blocks.3.{part}.{kind}" for part in ("up", "down") for kind in ("weight", "bias")]


class PairBlock(nn.Module):
    """Returns a hidden state and a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(8)

    def forward(self, x: Tensor, first: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        x = self.block(x + first, temb)
        return x, x[:, :1]


class Pair(OneStream):
    """Writes to a view of the hidden state after the blocks, and reads the change through the hidden state."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.blocks = nn.ModuleList(PairBlock() for _ in range(2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, temb = self.patch(x), self.embed(t)
        first = x[:, :1]
        for block in self.blocks:
            x, first = block(x, first, temb)
        first.mul_(3)
        return self.head(x)


def test_a_write_through_a_view_is_seen_or_refused() -> None:
    try:
        program = specialized(Pair())
    except UnsupportedGraphError:
        return
    check_hold(program, Pair().eval().requires_grad_(False))


def check_hold(program: ModelProgram, model: Tiny) -> None:
    """A step reused right after the one that filled the cache, on the same inputs, returns what that one returned."""
    args = model.example(step=1)
    wanted = eager(model, *args)
    outputs, state = compute(program, args, fresh(program.planned()), 0)
    assert same(outputs[: len(wanted)], wanted)
    for step in (1, 2):
        if program.planned().settings.reuse == "residual":
            check_close(reuse(program, args, state, step), wanted, 1e-5)  # x + (y - x) is y up to rounding
        elif isinstance(model, Interleaved):
            check_close(reuse(program, args, state, step), wanted, 1e-6)  # the slot is dense, the output a transpose: another kernel
        else:
            assert same(reuse(program, args, state, step), wanted)


def check_close(got: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for left, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


MODELS = [OneStream(), TwoStream(), InPlace(), Interleaved(), Refined(), Functional(), Exposed()]


@pytest.mark.parametrize("kind", ["output", "taylor"])
@pytest.mark.parametrize("model", MODELS, ids=lambda m: type(m).__name__)
def test_numbers_on_the_same_inputs(model: Tiny, kind: str) -> None:
    check_hold(specialized(model, reuse=kind), model)


@pytest.mark.parametrize("kind", ["output", "taylor"])
def test_numbers_of_two_outputs(kind: str) -> None:
    program = specialized(TwoStream(), reuse=kind, compute_last=2)
    assert len(program.planned().regions[0].outputs) == 2
    check_hold(program, TwoStream().eval())


def by_hand(model: OneStream, step: int) -> tuple[Tensor, Tensor]:
    """Return the hidden state before and after the blocks."""
    x, t = model.example(step=step)
    start = hidden = model.patch(x)
    for block in model.blocks:
        hidden = block(hidden, model.embed(t))
    return start, hidden


def test_numbers_on_other_inputs() -> None:
    model = OneStream().eval().requires_grad_(False)
    starts, ends = zip(*(by_hand(model, step) for step in range(3)), strict=True)
    wanted = {
        "output": ends[1],
        "residual": starts[2] + (ends[1] - starts[1]),
        "taylor": ends[1] + (ends[1] - ends[0]),  # the time moves as far at each step
    }
    for kind in WAYS:
        program = specialized(model, reuse=kind)
        state = fresh(program.planned())
        for step in range(2):
            _, state = compute(program, model.example(step=step), state, step)
        got = reuse(program, model.example(step=2), state, 2)
        torch.testing.assert_close(got[0], model.head(wanted[kind]), rtol=1e-6, atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(models(), st.sampled_from(WAYS), st.integers(0, 1))
def test_no_cached_block_is_left(model: Tiny, kind: str, last: int) -> None:
    try:
        program = specialized(model, reuse=kind, compute_last=last)
    except ConfigError:
        assert kind == "residual"
        return
    plan = program.planned()
    graphs = [module for module in program.reuse.modules() if isinstance(module, GraphModule)]
    assert not any(node.meta.get(REGION_MARK) for graph in graphs for node in graph.graph.nodes)
    marked = [n for m in program.compute.modules() if isinstance(m, GraphModule) for n in m.graph.nodes if n.meta.get(REGION_MARK)]
    assert [node.name for node in marked] == list(plan.regions[0].nodes), "the mark is there to be missed"
    assert op_counts(program.reuse)["linear"] < op_counts(program.compute)["linear"]
    inputs = [node.name for node in program.reuse.graph.find_nodes(op="placeholder")]
    taken = [f"policy_{parameter.name}" for parameter in plan.settings.way.parameters]
    assert inputs == [*program.signature.inputs, *(f"cache_in_{name}" for name in program.reuse_slots), *taken, "step"]
    roles = {"output": ("output",), "residual": ("output",), "taylor": ("output", "previous", "times")}[kind]
    assert program.reuse_slots == tuple(slot.name for slot in plan.slots if slot.role in roles)
    check_hold(program, model)
