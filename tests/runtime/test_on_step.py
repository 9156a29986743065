"""What callbacks are told after each step, and that nothing is read where there are none."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bwcache_compile as bw
from bwcache_compile.ir.policy_tensors import host_decision
from bwcache_compile.stepping import RunStep
from tests.exporters.helpers import opened
from tests.models import OneStream
from tests.runtime.helpers import STATIC, generation, pattern, run

SCHEDULE = bw.CacheConfig(num_steps=6, threshold=math.inf, reuse_interval=1, tail=0.0)


class Reads(TorchDispatchMode):
    """Counts the values that are read on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_each_step_is_told_with_its_reason(model: OneStream) -> None:
    cached = bw.transform(model, SCHEDULE)
    events: list[bw.StepEvent] = []
    handle = cached.on_step(events.append)
    generation(cached, model, name="cond")
    record = cached.report().contexts["cond"].steps
    assert [(event.context, event.step, event.num_steps) for event in events] == [("cond", step, 6) for step in range(6)]
    assert [event.computed for event in events] == [step.computed for step in record]
    assert [event.indicator for event in events] == [step.indicator for step in record]
    assert [event.reason for event in events] == [
        "a new generation began: the first call",
        "step 0 allowed no reuse",
        "step 1 allowed reuse up to step 2",
        "the reuse that step 1 allowed ended at step 2",
        "step 3 allowed reuse up to step 4",
        "the reuse that step 3 allowed ended at step 4",
    ]
    ends = [event.entered + event.seconds for event in events]
    assert all(event.seconds > 0 for event in events)
    assert all(end <= event.entered for end, event in zip(ends, events[1:], strict=False)), "one call after the other"
    handle.remove()
    handle.remove()
    generation(cached, model, name="cond")
    assert len(events) == 6


def test_a_lost_cache_is_the_reason(model: OneStream) -> None:
    cached = bw.transform(model, STATIC)
    events: list[bw.StepEvent] = []
    cached.on_step(events.append)
    generation(cached, model, steps=2)
    cached.invalidate()
    run(cached, *model.example(step=2))
    assert events[-1].reason == "the weights changed before step 2: the cache was cleared"


def test_nothing_is_read_unless_someone_listens(model: OneStream) -> None:
    cached = bw.transform(model, SCHEDULE)
    generation(cached, model, name="cond")

    def reads(step: int, index: int) -> int:
        x, t = model.example(step=step)
        with Reads() as mode, cached.cache_context("cond", step_index=index):
            run(cached, x, t)
        return mode.count

    silent = [reads(step, step) for step in range(6)]
    assert silent == [1, 1, 0, 1, 0, 1], "how many steps reuse, after a computed one"
    handle = cached.on_step(lambda event: None)
    assert [reads(step, step) for step in range(6)] == [1, 2, 0, 2, 0, 2], "and its indicator, where there is one"
    handle.remove()
    assert [reads(step, step) for step in range(6)] == silent


@pytest.mark.parametrize("batch_reduce", ["joint", "per_sample"])
def test_with_a_mask_no_step_reads_anything(model: OneStream, batch_reduce: Any) -> None:
    """What follows a computed step is known on the host: no step waits for the device. It is as the graph says."""
    cached = bw.transform(model, dataclasses.replace(STATIC, batch_reduce=batch_reduce))
    generation(cached, model)
    cached.reset()
    with Reads() as mode:
        generation(cached, model)
    assert mode.count == 0
    patterns = {"".join("#" if record.computed else "." for record in c.steps) for c in cached.report().contexts.values()}
    assert patterns == {"#..#.#"}


def test_the_graph_decides_as_the_host_does(model: OneStream) -> None:
    cached = bw.transform(model, STATIC)
    state = cached.init_state(model.example())
    with torch.no_grad():
        for step in range(6):
            _, state = cached.functional_step(model.example(step=step), {}, state)  # reads what the graph decided
            if not STATIC.steps_mask[step]:
                left = host_decision(cached.cache_config, None, step)
                assert left is not None
                assert state.cursor.reuse_until == step + left
    assert host_decision(SCHEDULE, 6, 0) is None


def test_a_callback_that_raises_does_so_after_its_step(model: OneStream) -> None:
    cached = bw.transform(model, STATIC)

    def stop(event: bw.StepEvent) -> None:
        if event.step == 1:
            raise KeyboardInterrupt

    handle = cached.on_step(stop)
    with pytest.raises(KeyboardInterrupt):
        generation(cached, model)
    handle.remove()
    assert pattern(cached) == "#."
    x, t = model.example(step=2)
    run(cached, x, t)
    assert pattern(cached) == "#..", "the context is free, and the step was done"


def test_a_callback_may_call_the_model_and_reset_it(model: OneStream) -> None:
    cached = bw.transform(model, STATIC)
    seen: list[str] = []

    def again(event: bw.StepEvent) -> None:
        seen.append(event.context)
        if event.context == "default":
            with cached.cache_context("other"):
                run(cached, *model.example())
            cached.reset()

    cached.on_step(again)
    run(cached, *model.example())
    assert seen == ["default", "other"]
    assert cached.report().contexts == {}


def test_a_guard_in_the_graph_is_read_for_those_who_listen(model: OneStream) -> None:
    cached = bw.transform(model, SCHEDULE, guard="graph")
    events: list[bw.StepEvent] = []
    cached.on_step(events.append)
    generation(cached, model)
    assert [event.computed for event in events] == [True, True, False, True, False, True]
    assert {event.reason for event in events[1:]} == {"decided in the graph"}
    assert [event.indicator for event in events] == [record.indicator for record in cached.report().contexts["default"].steps]


def test_a_session_tells_the_same(model: OneStream, tmp_path: Any) -> None:
    cached = bw.transform(model, SCHEDULE, example_args=model.example())
    bw.export(cached, tmp_path / "bundle", format="pt2")
    session = opened(tmp_path / "bundle")
    told: dict[str, list[bw.StepEvent]] = {"cached": [], "session": []}
    cached.on_step(told["cached"].append)
    session.on_step(told["session"].append)
    generation(cached, model)
    for step in range(6):
        run(session, *model.example(step=step))  # type: ignore[arg-type]
    assert told["session"] == told["cached"]
    assert len(told["session"]) == 6


def test_a_loop_that_is_followed_says_run_and_step(model: OneStream) -> None:
    cached = bw.transform(model, policy="static", steps_mask=(0, 1, 1, 0, 1, 0))
    x, t = model.example()  # the same time at each call, which tells nothing
    run_of: list[RunStep] = []
    cached.follow(lambda: run_of[-1])

    def calls(mark: object, steps: range, each: int) -> None:
        for step in steps:
            run_of.append(RunStep(mark, 6, True, step or None))
            for _ in range(each):
                run(cached, x, t)

    calls("first", range(3), 2)
    assert pattern(cached, "call_0") == pattern(cached, "call_1") == "#.."
    calls("second", range(4, 6), 1)
    assert {name: [step.step for step in context.steps] for name, context in cached.report().contexts.items()} == {"call_0": [4, 5]}
    assert pattern(cached, "call_0") == "##", "what the first run left is not used"
    with pytest.raises(bw.StateError, match=r"^the model was called 16 times at step 5 of a pipeline's run"):
        calls("second", range(5, 6), 17)
    cached.follow(None)
    run(cached, x, t)
    assert pattern(cached) == "#"
