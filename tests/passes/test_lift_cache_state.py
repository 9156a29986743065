"""lift_cache_state: the cache is passed in and returned, and nothing else is."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st

from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import ConfigError, InvariantError
from bwcache_compile.ir.graph_text import diff_graphs
from bwcache_compile.ir.program import ModelProgram
from bwcache_compile.passes.lift_cache_state import lift_cache_state
from tests.models import Exposed, Interleaved, OneStream, Tiny, TwoStream
from tests.passes.helpers import (
    WAYS,
    applied,
    compute,
    eager,
    fill_buffers,
    folded,
    fresh,
    models,
    policy_inputs,
    ready_for,
    same,
    text,
)

aten = torch.ops.aten


def diff(model: Tiny, **settings: object) -> str:
    program = ready_for(lift_cache_state, model, CacheConfig(**{"num_steps": 4, "indicator_blocks": 1, **settings}))
    before = text(program, depth=0)
    return folded(diff_graphs(before, text(applied(lift_cache_state, program), depth=0), "lift_cache_state"))


def test_output() -> None:
    assert_expected_inline(
        diff(OneStream(depth=2)),
        """\
@@ lift_cache_state
+cache_in_reference_0: f32[1, 8] = input
+cache_in_trigger: i64[1] = input
-copy__default: f32[1, 6, 8] = copy_(cache.output_0, region_0)
-change: f32[1] = call(indicator, feature_0, cache.reference_0)
-copy__default_1: f32[1, 8] = copy_(cache.reference_0, feature_0)
-policy: (i64[1], i64[1]) = call(policy, change, cache.trigger, step, policy_threshold, policy_interval,
policy_tail_numerator, policy_tail_denominator, policy_warmup, policy_num_steps)
+change: f32[1] = call(indicator, feature_0, cache_in_reference_0)
+policy: (i64[1], i64[1]) = call(policy, change, cache_in_trigger, step, policy_threshold, policy_interval,
policy_tail_numerator, policy_tail_denominator, policy_warmup, policy_num_steps)
-copy__default_2: i64[1] = copy_(cache.trigger, trigger)
-return linear_6, reuse_left, change
+return linear_6, region_0, feature_0, trigger, reuse_left, change""",
    )


def test_taylor_hands_the_old_output_on() -> None:
    assert_expected_inline(
        diff(OneStream(depth=2), reuse="taylor", policy="static", steps_mask=(0, 1), num_steps=None),
        """\
@@ lift_cache_state
+cache_in_output_0: f32[1, 6, 8] = input
+cache_in_times: f32[2, 2] = input
-copy__default: f32[1, 6, 8] = copy_(cache.previous_0, cache.output_0)
-copy__default_1: f32[1, 6, 8] = copy_(cache.output_0, region_0)
-keep_shared: f32[2, 2] = call(keep_shared, t, step, cache.times)
-copy__default_2: f32[2, 2] = copy_(cache.times, keep_shared)
+keep_shared: f32[2, 2] = call(keep_shared, t, step, cache_in_times)
-return linear_6, reuse_left
+return linear_6, region_0, cache_in_output_0, keep_shared, reuse_left""",
    )


def ready() -> ModelProgram:
    return ready_for(lift_cache_state, OneStream(depth=2), CacheConfig(policy="static", steps_mask=(0, 1)))


def refusal(program: ModelProgram) -> str:
    before = text(program)
    with pytest.raises(InvariantError) as caught:
        lift_cache_state(program)
    assert text(program) == before
    return str(caught.value)


def test_a_slot_that_is_never_written_is_refused() -> None:
    program = ready()
    graph = program.compute.graph
    graph.erase_node(graph.find_nodes(op="call_function", target=aten.copy_.default)[0])
    assert refusal(program) == "lift_cache_state: the slot output_0 is written 0 times, not once."


def test_a_slot_that_is_written_twice_is_refused() -> None:
    program = ready()
    graph = program.compute.graph
    (write,) = graph.find_nodes(op="call_function", target=aten.copy_.default)
    with graph.inserting_after(write):
        graph.node_copy(write, lambda node: node)
    assert refusal(program) == "lift_cache_state: the slot output_0 is written 2 times, not once."


def test_a_slot_that_is_read_after_it_is_written_is_refused() -> None:
    program = ready()
    graph = program.compute.graph
    (write,) = graph.find_nodes(op="call_function", target=aten.copy_.default)
    with graph.inserting_after(write):
        graph.create_node("call_function", aten.neg.default, (write.args[0],), name="late")
    message = "lift_cache_state: the slot output_0 is read after it is written, at `late = neg(cache.output_0)`."
    assert refusal(program) == message


def test_lifting_twice_changes_nothing() -> None:
    once = applied(lift_cache_state, ready())
    before = text(once)
    again = lift_cache_state(once)
    assert not again.modified
    assert (text(again.program), again.program.compute_slots) == (before, once.compute_slots)


def check_numbers(model: Tiny, config: CacheConfig) -> None:
    buffered, lifted = (ready_for(lift_cache_state, model, config) for _ in range(2))
    lifted = applied(lift_cache_state, lifted)
    plan = lifted.planned()
    fill_buffers(buffered)
    holder = buffered.compute.get_submodule("bwcache_cache")
    state = fresh(plan)
    values = policy_inputs(lifted)
    for step in range(3):
        args = model.example(step=step)
        wanted = list(buffered.compute(*(arg.clone() for arg in args), *values, torch.tensor([step])))
        got, state = compute(lifted, args, state, step)
        assert same(got, wanted)
        assert same(got[: lifted.signature.out_spec.num_leaves], eager(model, *args))
        assert list(state) == [slot.name for slot in plan.slots]
        assert same(list(state.values()), [getattr(holder, name) for name in state])
    assert not list(lifted.compute.named_buffers(prefix="bwcache_cache", recurse=False))
    assert not hasattr(lifted.compute, "bwcache_cache")


MODELS = [OneStream(), TwoStream(), Exposed(), Interleaved()]


@pytest.mark.parametrize("reuse", ["output", "taylor"])
@pytest.mark.parametrize("model", MODELS, ids=lambda m: type(m).__name__)
def test_numbers(model: Tiny, reuse: str) -> None:
    check_numbers(model, CacheConfig(num_steps=4, reuse=reuse, indicator_tokens=2))


def test_numbers_residual_static() -> None:
    check_numbers(OneStream(), CacheConfig(reuse="residual", policy="static", steps_mask=(0, 0, 0)))


@settings(max_examples=10, deadline=None)
@given(models(), st.sampled_from(WAYS), st.sampled_from([1, "all"]), st.booleans())
def test_state_round_trips(model: Tiny, reuse: str, blocks: int | str, static: bool) -> None:
    policy = {"policy": "static", "steps_mask": (0, 1, 0, 1)} if static else {"num_steps": 4}
    try:
        program = applied(lift_cache_state, ready_for(lift_cache_state, model, CacheConfig(reuse=reuse, indicator_blocks=blocks, **policy)))
    except ConfigError:
        assert reuse == "residual"
        return
    plan = program.planned()
    state, args = fresh(plan), model.example()
    returned = program.compute(*args, *(state[n] for n in program.compute_slots), *policy_inputs(program), torch.tensor([0]))
    assert len(returned) == len(eager(model, *args)) + len(plan.slots) + (1 if static else 2)
    first, once = compute(program, args, state, 0)
    _, twice = compute(program, args, once, 1)
    for slot in plan.slots:
        assert (once[slot.name].shape, once[slot.name].dtype) == (slot.shape, slot.dtype)
        if slot.role in ("output", "reference"):
            assert torch.equal(once[slot.name], twice[slot.name]), "the same inputs give the same state"
    for i in range(len(plan.regions[0].outputs) if reuse == "taylor" else 0):
        assert torch.equal(twice[f"previous_{i}"], once[f"output_{i}"])
    reads = {slot.role for slot in plan.slots if slot.name in program.compute_slots}
    assert reads == ({"output", "times"} if reuse == "taylor" else set()) | (set() if static else {"reference", "trigger"})
    assert same(first[: len(eager(model, *args))], eager(model, *args))
