"""The policies against the decision vectors and the oracle, and the indicator's arithmetic."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bwcache_compile as bw
from bwcache_compile.ir.policy_tensors import policy_parameters
from bwcache_compile.policies.l1 import relative_change
from bwcache_compile.policies.reuse.linear import linear
from bwcache_compile.policies.sampling import sampled_tokens
from bwcache_compile.policies.schedule import schedule
from bwcache_compile.policies.static import static
from tests.reference import decide

CASES = json.loads((Path(__file__).parent / "data" / "schedule.json").read_text())


@dataclasses.dataclass
class Trace:
    """What a run over given indicators did."""

    reused: list[int]
    trigger: int | None


def run_schedule(config: bw.CacheConfig, indicators: list[float | None], first: int = 0) -> Trace:
    """Drive the tensor policy as the runtime does: ask after each computed step, count down while reusing."""
    assert config.num_steps is not None
    parameters = policy_parameters(config, config.num_steps, torch.device("cpu"))
    trigger, left, reused = torch.tensor([-1]), 0, []
    for step in range(first, config.num_steps):
        if left > 0:
            left -= 1
            reused.append(1)
            continue
        value = indicators[step]
        change = torch.tensor([math.nan if value is None else value], dtype=torch.float32)
        trigger, remaining = schedule(change, trigger, torch.tensor([step]), *parameters)
        left = int(remaining)
        reused.append(0)
    return Trace(reused, None if int(trigger) < 0 else int(trigger))


def config_of(case: dict[str, Any]) -> bw.CacheConfig:
    names = ("num_steps", "tail", "threshold", "warmup_steps")
    return bw.CacheConfig(**{name: case[name] for name in names}, **interval_setting(case["reuse_interval"]))


def interval_setting(interval: float) -> dict[str, Any]:
    """Return the setting of an int, which counts steps, or of a float, which is a fraction of them."""
    return {"reuse_interval" if isinstance(interval, int) else "reuse_fraction": interval}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.get("note", "").replace(" ", "-") or None)
def test_schedule_follows_the_vectors(case: dict[str, Any]) -> None:
    config = config_of(case)
    assert config.resolved_interval(case["num_steps"]) == case["resolved_interval"]
    trace = run_schedule(config, case["indicator"])
    assert trace.reused == case["reuse"]
    assert trace.trigger == case["trigger"]


def test_worked_example() -> None:
    config = bw.CacheConfig(num_steps=30, reuse_interval=3)
    trace = run_schedule(config, [None, *[0.5] * 7, *[0.1] * 22])
    assert trace.trigger == 8
    assert [s for s, r in enumerate(trace.reused) if r] == [9, 10, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25]


# Values far enough from any drawn threshold that float32 and float64 agree.
grid = st.integers(0, 20).map(lambda i: i / 20 + 0.013)


@settings(max_examples=300, deadline=None)
@given(
    data=st.data(),
    steps=st.integers(1, 60),
    interval=st.one_of(st.integers(1, 12), st.integers(1, 1000).map(lambda i: i / 1000)),
    tail=st.integers(0, 100).map(lambda i: i / 100),
    threshold=st.one_of(st.integers(0, 20).map(lambda i: i / 20), st.just(math.inf)),
    warmup=st.integers(0, 8),
    first=st.integers(0, 5),
)
def test_schedule_is_the_oracle(data: Any, steps: int, interval: float, tail: float, threshold: float, warmup: int, first: int) -> None:
    values = st.one_of(grid, st.sampled_from([None, math.inf]))
    indicators = data.draw(st.lists(values, min_size=steps, max_size=steps))
    if first < steps:
        indicators[first] = None  # a context that joins late has nothing to compare with either
    config = bw.CacheConfig(num_steps=steps, **interval_setting(interval), tail=tail, threshold=threshold, warmup_steps=warmup)
    trace = run_schedule(config, indicators, min(first, steps))
    measured: dict[int, float] = {}
    trigger: int | None = None
    for step, reused in zip(range(first, steps), trace.reused, strict=False):
        expected, trigger = decide(measured, step, trigger, config)
        assert bool(reused) == expected, f"step {step} of {indicators}"
        if not reused:
            value = indicators[step]
            measured[step] = math.nan if value is None else value


@settings(max_examples=200, deadline=None)
@given(mask=st.lists(st.integers(0, 1), min_size=0, max_size=40))
def test_static_follows_its_mask(mask: list[int]) -> None:
    mask = [0, *mask]
    left, reused = 0, []
    for step in range(len(mask)):
        if left:
            left -= 1
            reused.append(1)
        else:
            left = int(static(torch.tensor(mask), torch.tensor([step])))
            reused.append(0)
    assert reused == mask


def test_a_float16_sum_does_not_overflow() -> None:
    old = torch.full((1, 4096, 64), 8.0, dtype=torch.float16)
    assert torch.isinf(old.sum(dtype=torch.float16))
    change = relative_change([old * 1.25], [old])
    assert change.dtype == torch.float32
    torch.testing.assert_close(change, torch.tensor([0.25]), rtol=1e-6, atol=0)


def test_a_fresh_reference_counts_as_changed() -> None:
    change = relative_change([torch.ones(1, 4, 8)], [torch.zeros(1, 4, 8)])
    assert not torch.isfinite(change).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_reuse_while_any_block_is_not_finite(bad: float) -> None:
    config = bw.CacheConfig(num_steps=20, reuse_interval=3, tail=0.0)
    parameters = policy_parameters(config, 20, torch.device("cpu"))

    def after(step: int, trigger: int, change: list[float]) -> tuple[int, int]:
        now, left = schedule(torch.tensor(change), torch.tensor([trigger]), torch.tensor([step]), *parameters)
        return int(now), int(left)

    assert after(4, -1, [0.01, bad]) == (-1, 0), "before the trigger"
    assert after(8, 4, [0.01, bad]) == (4, 0), "after the trigger"
    assert after(9, 4, [0.01, 0.01]) == (4, 2), "reuse goes on up to the next step that is computed anyway"


def test_sampled_tokens_are_stratified_and_differ_between_blocks() -> None:
    places = [sampled_tokens(1024, 32, block) for block in range(12)]
    for chosen in places:
        assert torch.equal(chosen // 32, torch.arange(32)), "one token in every stratum"
    assert len(torch.cat(places).unique()) > 250, "blocks look at different tokens"
    assert len((places[0] % 32).unique()) > 12, "no fixed column of a 32-wide grid"


@settings(max_examples=100, deadline=None)
@given(count=st.integers(1, 5000), stride=st.integers(1, 64), block=st.integers(0, 80))
def test_sampled_tokens_stay_inside(count: int, stride: int, block: int) -> None:
    chosen = sampled_tokens(count, stride, block)
    assert len(chosen) == max(1, count // stride)
    assert int(chosen.min()) >= 0
    assert int(chosen.max()) < count
    assert len(chosen.unique()) == len(chosen)


def test_extrapolation_continues_the_line_and_holds_without_two_steps() -> None:
    last, previous = torch.tensor([3.0, 5.0]), torch.tensor([1.0, 6.0])

    def at(times: list[float], now: float, dtype: torch.dtype = torch.float32, steps: tuple[float, float] = (4, 3)) -> Tensor:
        kept = torch.tensor([times, steps]).T
        parameters = policy_parameters(bw.CacheConfig(reuse="taylor", num_steps=8), 8)[-4:]
        anchors = (last.to(dtype), previous.to(dtype))
        result: Tensor = linear(2).reuse(*anchors, torch.tensor([now]), torch.tensor([6]), kept, *parameters)
        return result

    assert torch.equal(at([900.0, 940.0], 880.0), torch.tensor([4.0, 4.5])), "half a step further"
    assert torch.equal(at([900.0, math.nan], 880.0, steps=(4, math.nan)), last), "one step is known"
    assert torch.equal(at([900.0, 900.0], 900.0), torch.tensor([7.0, 3.0])), "the time stands still: two steps further"
    assert torch.equal(at([math.nan, math.nan], math.nan), torch.tensor([7.0, 3.0])), "the time is not finite"
    assert at([900.0, 940.0], 880.0, torch.bfloat16).dtype == torch.bfloat16


def test_tail_is_floored_exactly() -> None:
    """0.58 * 50 is 28.999999999999996 in floating point."""
    config = bw.CacheConfig(num_steps=100, reuse_interval=1, tail=0.58)
    indicators: list[float | None] = [None, *[0.5] * 49, *[0.01] * 50]
    trace = run_schedule(config, indicators)
    assert trace.trigger == 50
    assert max(s for s, r in enumerate(trace.reused) if r) < 100 - 29
    assert (
        decide(
            {50: 0.01},
            71,
            None,
            SimpleNamespace(reuse_fraction=None, num_steps=100, reuse_interval=1, tail=0.58, threshold=0.15, warmup_steps=0),
        )[0]
        is False
    )
