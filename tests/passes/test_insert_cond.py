"""insert_cond: one graph that computes or reuses by itself, and does in every step what the pair of graphs does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import ConfigError, InvariantError
from bwcache_compile.ir.graph_text import called_graphs, format_graph, format_node, op_counts
from bwcache_compile.ir.program import REGION_MARK, ModelProgram
from bwcache_compile.ir.verify import verify
from bwcache_compile.passes import CACHE_PIPELINE, GUARD_PIPELINE, run_pipeline
from bwcache_compile.passes.insert_cond import insert_cond
from tests.models import Block, Exposed, Functional, InPlace, Interleaved, OneStream, PostNorm, Refined, Tiny, TwoStream
from tests.passes.helpers import MASK, WAYS, eager, folded, fresh, models, planned, policy_inputs, policy_values, reuse, same, way_inputs
from tests.reference import BlockOracle

STATIC = {"policy": "static", "steps_mask": MASK}


def guarded(model: Tiny, pipeline: Any = GUARD_PIPELINE, **changes: Any) -> ModelProgram:
    return run_pipeline(
        planned(model, CacheConfig(**{"num_steps": 8, **changes, **({"num_steps": None} if "policy" in changes else {})})), pipeline
    )


def start(program: ModelProgram) -> list[Tensor]:
    return [torch.full(slot.shape, slot.fill, dtype=slot.dtype) for slot in program.planned().guard_slots]


def step_once(
    program: ModelProgram, args: tuple[Tensor, ...], state: list[Tensor], step: int, **policy: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Run the guarded graph; return what it returns besides the state, and the next state. Its operands stay as they are."""
    values = policy_inputs(program, **policy)
    before = [slot.clone() for slot in state]
    returned = list(program.guarded(*(arg.clone() for arg in args), *state, *values, *way_inputs(program), torch.tensor([step])))
    assert same(before, state)
    users = program.signature.out_spec.num_leaves
    following = returned[users : users + len(state)]
    assert len({t.data_ptr() for t in [*following, *state]}) == 2 * len(state), "every slot has memory of its own"
    return returned[:users] + returned[users + len(state) :], following


def test_guarded_graph() -> None:
    shown = format_graph(guarded(OneStream(depth=2), **STATIC).guarded, depth=0)
    assert_expected_inline(
        shown.replace(", blocks", ",\n    blocks"),
        """\
x: f32[1, 6, 4] = input
t: f32[1] = input
cache_in_output_0: f32[1, 6, 8] = input
cache_in_reuse_until: i64[1] = input
policy_mask: i64[5] = input
step: i64[1] = input
now: i64[] = reshape(step, [])
last: i64[] = reshape(cache_in_reuse_until, [])
reuses: b8[] = le(now, last)
guard: (f32[1, 6, 8], i64[1]) = cond(reuses, reuse_arm, compute_arm, [x, patch.weight, patch.bias, t, time.weight, time.bias,
    blocks.0.up.weight,
    blocks.0.up.bias,
    blocks.0.down.weight,
    blocks.0.down.bias,
    blocks.1.up.weight,
    blocks.1.up.bias,
    blocks.1.down.weight,
    blocks.1.down.bias, step, policy_mask, cache_in_output_0, cache_in_reuse_until])
region_0: f32[1, 6, 8] = getitem(guard, 0)
reuse_until: i64[1] = getitem(guard, 1)
linear_6: f32[1, 6, 4] = linear(region_0, head.weight, head.bias)
return linear_6, region_0, reuse_until""",
    )


def test_arms() -> None:
    program = guarded(OneStream(depth=2), **STATIC, reuse="residual")
    (guard,) = [node for node in program.guarded.graph.nodes if node.name == "guard"]
    arms = dict(called_graphs(program.guarded, guard))
    shown = [f"{name}: {format_node(n)}" for name, arm in arms.items() for n in arm.graph.nodes if n.op in ("call_function", "output")]
    assert_expected_inline(
        "\n".join(shown),
        """\
reuse_arm: add: f32[1, 6, 8] = add(linear, cache_in_output_0)
reuse_arm: clone_default: f32[1, 6, 8] = clone(cache_in_output_0)
reuse_arm: clone_default_1: i64[1] = clone(cache_in_reuse_until)
reuse_arm: return add, clone_default, clone_default_1
compute_arm: view: f32[1, 1, 1] = view(t, [-1, 1, 1])
compute_arm: linear_1: f32[1, 1, 8] = linear(view, time_weight, time_bias)
compute_arm: mul: f32[1, 6, 8] = mul(linear, linear_1)
compute_arm: linear_2: f32[1, 6, 8] = linear(mul, blocks_0_up_weight, blocks_0_up_bias)
compute_arm: gelu: f32[1, 6, 8] = gelu(linear_2)
compute_arm: linear_3: f32[1, 6, 8] = linear(gelu, blocks_0_down_weight, blocks_0_down_bias)
compute_arm: add: f32[1, 6, 8] = add(linear, linear_3)
compute_arm: mul_1: f32[1, 6, 8] = mul(add, linear_1)
compute_arm: linear_4: f32[1, 6, 8] = linear(mul_1, blocks_1_up_weight, blocks_1_up_bias)
compute_arm: gelu_1: f32[1, 6, 8] = gelu(linear_4)
compute_arm: linear_5: f32[1, 6, 8] = linear(gelu_1, blocks_1_down_weight, blocks_1_down_bias)
compute_arm: add_1: f32[1, 6, 8] = add(add, linear_5)
compute_arm: sub: f32[1, 6, 8] = sub(add_1, linear)
compute_arm: arange: i64[5] = arange(5, device=cpu, pin_memory=False)
compute_arm: gt: b8[5] = gt(arange, step)
compute_arm: eq: b8[5] = eq(policy_mask, 0)
compute_arm: bitwise_and: b8[5] = bitwise_and(gt, eq)
compute_arm: full_like: i64[5] = full_like(arange, 5, pin_memory=False)
compute_arm: where: i64[5] = where(bitwise_and, arange, full_like)
compute_arm: min_1: i64[] = min(where)
compute_arm: view_1: i64[1] = view(min_1, [1])
compute_arm: sub_1: i64[1] = sub(view_1, step)
compute_arm: sub_2: i64[1] = sub(sub_1, 1)
compute_arm: add_tensor: i64[1] = add(step, sub_2)
compute_arm: return add_1, sub, add_tensor""",
    )


def test_the_prologue_of_the_region_alone_moves_in() -> None:
    """The patch embedding, the text refiners and the time embedding feed nothing but the blocks."""
    program = guarded(Refined(), **STATIC)
    outside = [format_node(node) for node in program.guarded.graph.nodes if node.op == "call_function" and node.name.startswith("linear")]
    assert outside == ["linear_13: f32[1, 6, 4] = linear(region_0, head.weight, head.bias)"]
    again = insert_cond(program)
    assert not again.modified


def test_a_source_stays_outside() -> None:
    """With residuals the reusing arm adds to this step's patch embedding, so that is computed at every step."""
    program = guarded(OneStream(), **STATIC, reuse="residual")
    outside = [node.name for node in program.guarded.graph.nodes if node.op == "call_function" and node.name.startswith("linear")]
    assert outside == ["linear", "linear_laid_out", "linear_8"]


class WritesBefore(OneStream):
    """The prologue writes to the embedding after a value that only the blocks need was read from it."""

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x, temb = self.patch(x), self.embed(t)
        scaled = x * 3
        x.mul_(2)
        for block in self.blocks:
            scaled = block(scaled, temb)
        return self.head(scaled), x


class PaddedRegion(TwoStream):
    """The epilogue reads a slice of the joined streams that a block returned: rows with gaps between them."""

    def forward(self, x: Tensor, text: Tensor, t: Tensor) -> Tensor:
        x, text, temb = self.patch(x), self.words(text), self.embed(t)
        for block in self.double_blocks:
            x, text = block(x, text, temb)
        rows = text.shape[1]
        for block in self.single_blocks:
            joined = block(torch.cat([text, x], dim=1), temb)
            text, x = joined[:, :rows], joined[:, rows:]
        return self.head(x) + text.mean()


class Turned(OneStream):
    """The blocks work on (batch, channels, tokens) in memory: their output is no contiguous tensor."""

    def __init__(self, depth: int = 2, width: int = 8) -> None:
        super().__init__(depth, width)
        self.blocks = nn.ModuleList(TurnedBlock(width) for _ in range(depth))


class TurnedBlock(Block):
    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return super().forward(x, temb).transpose(1, 2).contiguous().transpose(1, 2)


WHOLE = [OneStream(), TwoStream(), Interleaved(), InPlace(), Exposed(), Functional(), Refined(), WritesBefore(), PaddedRegion(), Turned()]


NO_RESIDUAL = (InPlace,)


@pytest.mark.parametrize("reusing", WAYS)
@pytest.mark.parametrize("model", WHOLE, ids=lambda model: type(model).__name__)
def test_does_what_the_pair_does(model: Tiny, reusing: str) -> None:
    if reusing == "residual" and type(model) in NO_RESIDUAL:
        with pytest.raises(ConfigError, match="no such input was found"):
            guarded(model, reuse=reusing)
        return
    pair = guarded(model, (*CACHE_PIPELINE, insert_cond), reuse=reusing, indicator_tokens=2)
    both_taken(model, pair, threshold=math.inf, interval=2, num_steps=8)


def both_taken(model: Tiny, program: ModelProgram, steps: int = 8, **policy: float) -> None:
    """Run the pair with the host counting, and the guarded graph on its own; every bit must agree."""
    kept, state, until = fresh(program.planned()), start(program), -1
    taken = set()
    for step in range(steps):
        args = model.example(step=step)
        reuses = step <= until
        taken.add(reuses)
        returned, state = step_once(program, args, state, step, **policy)
        if reuses:
            expected = reuse(program, args, kept, step)
        else:
            expected, kept = compute_with(program, args, kept, step, **policy)
            left, change = int(expected[-2]), expected[-1]
            until = step + left
            expected = [*expected[:-2], change]
            assert same(expected[:1], eager(model, *args)[:1])
        outputs = expected if not reuses else [*expected, torch.full_like(returned[-1], float("nan"))]
        assert same(returned, outputs), f"step {step}"
        assert same(state[:-1], list(kept.values()))
        assert int(state[-1]) == until
    assert taken == {True, False}, "both arms were taken"


def compute_with(
    program: ModelProgram, args: tuple[Tensor, ...], state: dict[str, Tensor], step: int, **policy: float
) -> tuple[list[Tensor], dict[str, Tensor]]:
    slots = [state[name].clone() for name in program.compute_slots]
    returned = list(program.compute(*(arg.clone() for arg in args), *slots, *policy_values(**policy), torch.tensor([step])))
    users, names = program.signature.out_spec.num_leaves, [slot.name for slot in program.planned().slots]
    kept = [value.clone() for value in returned[users : users + len(names)]]
    return returned[:users] + returned[users + len(names) :], dict(zip(names, kept, strict=True))


@settings(max_examples=12, deadline=None)
@given(models(), st.sampled_from(["output", "taylor"]), st.integers(1, 3), st.sampled_from([0.03, 0.06, math.inf]))
def test_any_model_any_policy(model: Tiny, reusing: str, interval: int, threshold: float) -> None:
    program = guarded(model, (*CACHE_PIPELINE, insert_cond), reuse=reusing)
    kept, state = fresh(program.planned()), start(program)
    until = -1
    for step in range(6):
        args = model.example(step=step)
        returned, state = step_once(program, args, state, step, threshold=threshold, interval=interval, num_steps=6)
        if step <= until:
            expected = reuse(program, args, kept, step)
        else:
            expected, kept = compute_with(program, args, kept, step, threshold=threshold, interval=interval, num_steps=6)
            until = step + int(expected[-2])
            expected = expected[:-2]
        assert same(returned[:-1], expected)


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.09, math.inf])
@pytest.mark.parametrize("depth", [1, 3])
def test_block_granularity_is_the_oracle(depth: int, threshold: float) -> None:
    model = OneStream(depth=max(depth, 2)).eval().requires_grad_(False)
    config = CacheConfig(
        num_steps=10, threshold=threshold, reuse_interval=2, tail=0.5, reuse="residual", granularity="block", indicator_tokens="all"
    )
    program = run_pipeline(planned(model, config), GUARD_PIPELINE)
    oracle, state = BlockOracle(model, list(model.blocks), config), start(program)
    mixed = False
    for step in range(10):
        x, t = model.example(step=step)
        returned, state = step_once(program, (x, t), state, step, threshold=threshold, interval=2, num_steps=10)
        expected, reused = oracle(x, t)
        torch.testing.assert_close(returned[0], expected, rtol=0, atol=0)
        assert returned[-1].isnan().tolist() == reused
        mixed |= any(reused) and not all(reused)
    if threshold == 0.05:
        assert mixed or depth == 1, "some blocks reused while others computed"


def test_block_granularity_needs_a_residual() -> None:
    with pytest.raises(ConfigError) as error:
        planned(PostNorm(), CacheConfig(num_steps=4, reuse="residual", granularity="block"))
    assert_expected_inline(
        folded(str(error.value)),
        """\
reuse='residual' does not fit PostNorm: it requires that each output of the blocks be an input of the blocks plus a
change, and for `layer_norm` f32[1, 6, 8] no such input was found (inputs: linear f32[1, 6, 8], linear_1 f32[1, 1, 8]).
  Followed back through sums and re-arrangements, its residual path ends at `layer_norm` of blocks.0.
  Use granularity='stack' with reuse='output' or 'taylor'.""",
    )


def test_an_arm_that_runs_a_block_when_it_reuses_is_noticed() -> None:
    program = guarded(OneStream(), **STATIC)
    node = next(n for n in program.guarded.bwcache_reuse_arm.graph.nodes if n.op == "call_function")
    node.meta[REGION_MARK] = True
    with pytest.raises(InvariantError, match="of a cached block runs on a reused step"):
        verify(program)


def test_arms_of_different_layouts_are_noticed() -> None:
    program = guarded(OneStream(), **STATIC)
    arm = program.guarded.bwcache_reuse_arm
    output = arm.graph.output_node()
    output.args = ((*output.args[0][1:], output.args[0][0]),)
    with pytest.raises(InvariantError, match="another layout"):
        verify(program)


def test_no_weight_is_copied() -> None:
    model = OneStream()
    program = guarded(model, **STATIC)
    own = {id(p) for p in model.parameters()}
    assert {id(p) for p in program.guarded.parameters()} == own
    assert op_counts(program.guarded)["linear"] == op_counts(program.captured.module())["linear"]
