"""insert_policy: the graph itself says how many of the following steps reuse."""

from __future__ import annotations

import math

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule

from bwcache_compile.config import CacheConfig
from bwcache_compile.ir.graph_text import diff_graphs, format_graph
from bwcache_compile.ir.program import ModelProgram
from bwcache_compile.passes.insert_policy import insert_policy
from tests.models import Exposed, OneStream, Tiny, TwoStream
from tests.passes.helpers import POLICY, applied, eager, fill_buffers, folded, models, policy_values, ready_for, same, text

STATIC = CacheConfig(policy="static", steps_mask=(0, 1, 1, 0, 1))


def diff(model: Tiny, depth: int, config: CacheConfig) -> str:
    program = ready_for(insert_policy, model, config)
    before = text(program, depth)
    return folded(diff_graphs(before, text(applied(insert_policy, program), depth), "insert_policy"))


def test_schedule() -> None:
    assert_expected_inline(
        diff(OneStream(depth=2), 0, CacheConfig(num_steps=4)),
        """\
@@ insert_policy
+policy_threshold: f32[1] = input
+policy_interval: i64[1] = input
+policy_tail_numerator: i64[1] = input
+policy_tail_denominator: i64[1] = input
+policy_warmup: i64[1] = input
+policy_num_steps: i64[1] = input
+step: i64[1] = input
-return linear_6
+policy: (i64[1], i64[1]) = call(policy, change, cache.trigger, step, policy_threshold, policy_interval,
policy_tail_numerator, policy_tail_denominator, policy_warmup, policy_num_steps)
+trigger: i64[1] = getitem(policy, 0)
+reuse_left: i64[1] = getitem(policy, 1)
+copy__default_3: i64[1] = copy_(cache.trigger, trigger)
+return linear_6, reuse_left, change""",
    )


def test_static() -> None:
    assert_expected_inline(
        diff(OneStream(depth=2), 8, STATIC),
        """\
@@ insert_policy
+policy_mask: i64[5] = input
+step: i64[1] = input
-return linear_6
+reuse_left: i64[1] = call(policy, policy_mask, step)
+  mask_1: i64[5] = input
+  step_1: i64[1] = input
+  arange: i64[5] = arange(5, device=cpu, pin_memory=False)
+  gt: b8[5] = gt(arange, step_1)
+  eq: b8[5] = eq(mask_1, 0)
+  bitwise_and: b8[5] = bitwise_and(gt, eq)
+  full_like: i64[5] = full_like(arange, 5, pin_memory=False)
+  where: i64[5] = where(bitwise_and, arange, full_like)
+  min_1: i64[] = min(where)
+  view: i64[1] = view(min_1, [1])
+  sub: i64[1] = sub(view, step_1)
+  sub_1: i64[1] = sub(sub, 1)
+  return sub_1
+return linear_6, reuse_left""",
    )


def test_taylor_counting_steps_shares_the_step() -> None:
    model = OneStream(depth=2)
    model.example = lambda: (OneStream.example(model)[0], torch.ones(1, 1))
    program = ready_for(insert_policy, model, CacheConfig(num_steps=4, reuse="taylor"))
    inputs = [node.name for node in applied(insert_policy, program).compute.graph.find_nodes(op="placeholder")]
    assert inputs == ["x", "t", *(f"policy_{name}" for name in POLICY), "step"]


def test_the_rest_of_the_graph_is_left_alone() -> None:
    program = ready_for(insert_policy, OneStream())
    inner = {name: format_graph(program.compute.get_submodule(name)) for name in ("bwcache_region", "bwcache_indicator")}
    after = applied(insert_policy, program)
    assert {name: format_graph(after.compute.get_submodule(name)) for name in inner} == inner
    assert [name for name, child in after.compute.named_children() if isinstance(child, GraphModule)] == [*inner, "bwcache_policy"]


class Step(OneStream):
    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        return super().forward(x, step)


class Change(OneStream):
    def forward(self, x: Tensor, change: Tensor) -> Tensor:
        return super().forward(x, change)


@pytest.mark.parametrize("model", [Step(depth=2), Change(depth=2)], ids=lambda m: type(m).__name__)
def test_a_users_input_of_the_same_name_stays_the_users(model: Tiny) -> None:
    after = applied(insert_policy, ready_for(insert_policy, model))
    inputs = after.compute.graph.find_nodes(op="placeholder")
    assert len(inputs) == 2 + len(POLICY) + 1
    call = next(node for node in after.compute.graph.nodes if node.target == "bwcache_policy")
    assert not set(call.args) & set(inputs[:2])


def decision(program: ModelProgram, step: int, trigger: int, **policy: float) -> tuple[int, int, float]:
    """Run a computed step whose features have moved; return `reuse_left`, the trigger, and the indicator."""
    fill_buffers(program)
    holder, model_args = program.compute.get_submodule("bwcache_cache"), OneStream().example(step=step)
    for name, value in holder.named_buffers():
        if name.startswith("reference"):
            value.fill_(1.0)
    holder.trigger.fill_(trigger)
    *_, left, change = program.compute(*model_args, *policy_values(**policy), torch.tensor([step]))
    return int(left), int(holder.trigger), float(change.mean())


def defined(indicator: float, step: int, trigger: int, policy: dict[str, float]) -> tuple[int, int]:
    """The schedule from its definition: walk on from a computed step until a step must compute."""
    if trigger < 0 and step >= max(1, policy["warmup"]) and indicator < policy["threshold"]:
        trigger = step
    if trigger < 0:
        return 0, trigger
    tail = policy["num_steps"] - math.floor(policy["tail_numerator"] * trigger / policy["tail_denominator"])
    following = step + 1
    while (following - trigger) % (policy["interval"] + 1) != 0 and following < tail:
        following += 1
    return following - step - 1, trigger


@pytest.fixture(scope="module")
def scheduled() -> ModelProgram:
    return applied(insert_policy, ready_for(insert_policy, OneStream()))


def test_worked_example(scheduled: ModelProgram) -> None:
    policy = {"threshold": math.inf, "interval": 3, "tail_numerator": 1, "tail_denominator": 2, "warmup": 8, "num_steps": 30}
    step, trigger, reused = 0, -1, []
    while step < 30:
        left, trigger, _ = decision(scheduled, step, trigger, **policy)
        assert left >= 0
        reused += range(step + 1, step + 1 + left)
        step += 1 + left
    assert trigger == 8
    assert reused == [9, 10, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25]


@pytest.mark.parametrize(("threshold", "left"), [(0.0, 0), (math.inf, 1)])
def test_the_ends_of_the_threshold(scheduled: ModelProgram, threshold: float, left: int) -> None:
    assert decision(scheduled, 1, -1, threshold=threshold)[0] == left
    assert decision(scheduled, 0, -1, threshold=threshold)[:2] == (0, -1), "nothing is cached before the first step"


def test_threshold_zero_never_reuses_though_nothing_moved(scheduled: ModelProgram) -> None:
    fill_buffers(scheduled)
    args = OneStream().example()
    for step in range(3):
        *_, left, change = scheduled.compute(*args, *policy_values(threshold=0.0, num_steps=30), torch.tensor([step]))
    assert change.tolist() == [0, 0, 0]
    assert (int(left), int(scheduled.compute.get_submodule("bwcache_cache").trigger)) == (0, -1)
    *_, left, _ = scheduled.compute(*args, *policy_values(threshold=1e-6, num_steps=30), torch.tensor([3]))
    assert int(left) == 1


@pytest.mark.parametrize("config", [CacheConfig(num_steps=4), STATIC], ids=["schedule", "static"])
@pytest.mark.parametrize("model", [OneStream(), TwoStream(), Exposed()], ids=lambda m: type(m).__name__)
def test_numbers(model: Tiny, config: CacheConfig) -> None:
    program = applied(insert_policy, ready_for(insert_policy, model, config))
    fill_buffers(program)
    args = model.example(step=1)
    values = [torch.tensor(config.steps_mask)] if config is STATIC else policy_values()
    outputs = program.compute(*(arg.clone() for arg in args), *values, torch.tensor([0]))
    wanted = eager(model, *args)
    assert same(list(outputs[: len(wanted)]), wanted)
    assert [tuple(value.shape) for value in outputs[len(wanted) :]] == (
        [(1,)] if config is STATIC else [(1,), (len(program.planned().measured),)]
    )
    assert int(outputs[len(wanted)]) == (2 if config is STATIC else 0)


@settings(max_examples=25, deadline=None)
@given(
    step=st.integers(0, 40),
    trigger=st.integers(-1, 20),
    threshold=st.sampled_from([0.0, 0.5, 3.0, math.inf]),
    interval=st.integers(1, 12),
    tail=st.fractions(0, 1, max_denominator=100),
    warmup=st.integers(0, 8),
    num_steps=st.integers(1, 41),
)
def test_the_graph_decides_as_defined(
    scheduled: ModelProgram, step: int, trigger: int, tail: object, num_steps: int, **rest: float
) -> None:
    step, trigger = min(step, num_steps - 1), min(trigger, step, num_steps - 1)
    policy = {**rest, "tail_numerator": tail.numerator, "tail_denominator": tail.denominator, "num_steps": num_steps}
    left, after, indicator = decision(scheduled, step, trigger, **policy)
    assert not math.isclose(indicator, policy["threshold"], rel_tol=1e-3), "the draw avoids near-ties"
    assert (left, after) == defined(indicator, step, trigger, policy)


@settings(max_examples=10, deadline=None)
@given(models(), st.integers(0, 3))
def test_static_counts_the_mask(model: Tiny, step: int) -> None:
    program = applied(insert_policy, ready_for(insert_policy, model, STATIC))
    assert [parameter.name for parameter in program.planned().settings.parameters] == ["mask"]
    fill_buffers(program)
    outputs = program.compute(*model.example(step=step), torch.tensor(STATIC.steps_mask), torch.tensor([step]))
    assert int(outputs[-1]) == [2, 1, 0, 1][step]
