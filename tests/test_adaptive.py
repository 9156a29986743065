"""policy="adaptive": as many steps as are expected to change by less than the threshold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bwcache_compile as bw
from bwcache_compile.ir.policy_tensors import policy_parameters
from bwcache_compile.policies.adaptive import adaptive
from tests.models import OneStream

STEPS = 8


@pytest.fixture(scope="module")
def model() -> OneStream:
    return OneStream().eval().requires_grad_(False)


def expected(indicator: float, computed_at: int, step: int, threshold: float, longest: int, warmup: int, num_steps: int) -> int:
    if computed_at < 0 or step + 1 < warmup or threshold == 0 or not math.isfinite(indicator):
        return 0
    rate = indicator / (step - computed_at)
    room = longest if rate == 0 else math.floor(min(longest, threshold / rate))
    return max(0, min(room, num_steps - 2 - step))


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([0.0, 0.013, 0.07, 0.31, math.inf, math.nan]), st.integers(-1, 5), st.integers(1, 4),
    st.sampled_from([0.0, 0.05, 0.2, 1.7, math.inf]), st.integers(1, 6), st.integers(0, 6), st.integers(6, 12),
)  # fmt: skip
def test_the_decision(indicator: float, computed_at: int, gap: int, threshold: float, longest: int, warmup: int, num_steps: int) -> None:
    step = max(computed_at, 0) + gap
    config = bw.CacheConfig(policy="adaptive", threshold=threshold, reuse_interval=longest, warmup_steps=warmup, num_steps=num_steps)
    parameters = policy_parameters(config, num_steps)
    change = torch.tensor([indicator, indicator], dtype=torch.float32)
    kept, left = adaptive(change, torch.tensor([computed_at]), torch.tensor([step]), *parameters)
    assert int(kept) == step
    assert int(left) == expected(indicator, computed_at, step, threshold, longest, warmup, num_steps)


def generation(cached: Any, model: OneStream) -> str:
    for step in range(STEPS):
        output = cached(*model.example(step=step))
        assert torch.isfinite(torch.as_tensor(output)).all()
    steps = cached.report().contexts["default"].steps
    return "".join("#" if record.computed else "." for record in steps)


@pytest.mark.parametrize("guard", ["host", "graph"])
def test_a_generation(model: OneStream, guard: Any) -> None:
    cached = bw.transform(model, policy="adaptive", threshold=math.inf, reuse_interval=2, num_steps=STEPS, guard=guard)
    assert generation(cached, model) == "##..#..#"
    cached.configure(threshold=0)
    assert generation(cached, model) == "########"
    cached.configure(threshold=math.inf, warmup_steps=4)
    assert generation(cached, model) == "####..##", "the last step is computed"


def test_the_number_of_steps_need_not_be_known(model: OneStream) -> None:
    cached = bw.transform(model, policy="adaptive", threshold=math.inf)
    assert generation(cached, model) == "##.....#", "at most five steps in a row"
    with pytest.raises(bw.ConfigError, match="reuse_fraction needs the number of steps"):
        generation(bw.transform(model, policy="adaptive", reuse_fraction=0.2), model)


def test_no_settings_at_all(model: OneStream) -> None:
    """What is recommended needs no number of steps, and computes the first two steps."""
    cached = bw.transform(model)
    assert cached.cache_config == bw.CacheConfig.recommended()
    assert generation(cached, model)[:2] == "##"
    assert bw.transform(model, num_steps=STEPS).cache_config == bw.CacheConfig(num_steps=STEPS)


def test_contexts_decide_together(model: OneStream) -> None:
    """The context that hardly changes does not reuse more than the one that does."""
    settings = {"policy": "adaptive", "threshold": 0.5, "reuse_interval": 3, "num_steps": STEPS}

    def run(decide: str) -> list[str]:
        cached = bw.transform(model, **settings, decide=decide)
        for step in range(STEPS):
            with cached.cache_context("moving"):
                cached(*model.example(step=3 * step))
            with cached.cache_context("still"):
                cached(model.example(step=0)[0] + 1e-3 * step, model.example(step=step)[1])
        contexts = cached.report().contexts.values()
        return ["".join("#" if r.computed else "." for r in context.steps) for context in contexts]

    alone, together = run("separate"), run("joint")
    assert alone[0] != alone[1], "apart, they differ"
    assert together[0] == together[1]


def test_a_generation_that_reused_nothing_is_explained(model: OneStream) -> None:
    cached = bw.transform(model, policy="adaptive", threshold=1e-9, num_steps=STEPS)
    with pytest.warns(bw.CacheWarning, match="no step of context 'default' was reused at threshold 1e-09: the slowest change was"):
        generation(cached, model)


def test_in_a_bundle(model: OneStream, tmp_path: Path) -> None:
    cached = bw.transform(model, policy="adaptive", threshold=math.inf, reuse_interval=2, num_steps=STEPS, example_args=model.example())
    bw.export(cached, tmp_path / "bundle", guarded=True)
    for guarded in (False, True):
        session = bw.load(tmp_path / "bundle", guarded=guarded)
        for step in range(STEPS):
            session(*(value.numpy() for value in model.example(step=step)))
        assert "".join("#" if r.computed else "." for r in session.report().contexts["default"].steps) == "##..#..#"
