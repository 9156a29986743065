"""A plan that is guarded: as calibrated, it is the plan; a run that goes another way computes more steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bwcache_compile as bw
from bwcache_compile.calibration.plan import MARGIN
from tests.models import OneStream

STEPS = 12


@pytest.fixture(scope="module")
def model() -> OneStream:
    torch.manual_seed(0)
    return OneStream(depth=3).eval().requires_grad_(False)


def generate(model: Any, guidance: float = 1.5, speed: float = 1.0, contexts: bool = True) -> Tensor:
    """Take Euler steps, with guidance in two calls a step."""
    times = torch.linspace(1, 0.1, STEPS)
    latents = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(1))
    for now, following in zip(times, [*times[1:], torch.tensor(0.0)], strict=True):
        if not contexts:
            latents = latents + speed * (following - now) * torch.as_tensor(model(latents, now.reshape(1)))
            continue
        with model.cache_context("cond"):
            conditioned = model(latents, now.reshape(1))
        with model.cache_context("uncond"):
            free = model(latents * 0.5, now.reshape(1))
        latents = latents + (following - now) * (free + guidance * (conditioned - free))
    return latents


@pytest.fixture(scope="module")
def plan(model: OneStream) -> bw.CalibrationPlan:
    cached = bw.transform(model, num_steps=STEPS)
    made = bw.calibrate(cached, generate, budgets=(0.5, 0.34), anchors=3, guarded=True, progress=False)
    assert cached.cache_config == bw.CacheConfig(num_steps=STEPS), "the model that it was given is as it was"
    return made


def added(cached: bw.CachedModel, entry: Any) -> dict[str, set[int]]:
    found = {}
    for name, context in cached.report().contexts.items():
        computed = {record.step for record in context.steps if record.computed}
        planned = {step for step, computes in enumerate(entry.mask) if computes}
        assert computed >= planned
        found[name] = computed - planned
    return found


def test_as_calibrated_it_is_the_plan_bit_for_bit(model: OneStream, plan: bw.CalibrationPlan) -> None:
    cached, plain = bw.transform(model, num_steps=STEPS), bw.transform(model, num_steps=STEPS)
    for budget, entry in zip((0.5, 0.34), plan.entries, strict=True):
        cached.configure(plan.at(budget, guarded=True))
        plain.configure(plan.at(budget))
        assert torch.equal(generate(cached), generate(plain))
        assert added(cached, entry) == {"cond": set(), "uncond": set()}
        assert cached.report().warnings == ()
        measured = [value is not None for value in entry.indicators or ()]
        assert measured == [computes and step > 0 for step, computes in enumerate(entry.mask)]
    assert plan.provenance.cost <= 4


def test_a_run_that_goes_another_way_computes_more_steps_and_says_which(model: OneStream, plan: bw.CalibrationPlan) -> None:
    cached, plain = bw.transform(model, plan.at(0.34, guarded=True)), bw.transform(model, plan.at(0.34))
    full = bw.transform(model, threshold=0, num_steps=STEPS)
    want, got, without = (generate(run, guidance=12.0) for run in (full, cached, plain))
    more = added(cached, plan.entries[1])
    assert more["cond"] == more["uncond"] != set(), "both contexts decide together"
    said = [warning.split(" instead of reused: ")[0] for warning in cached.report().warnings]
    assert said == [f"{name}: step {step} was computed" for name, steps in more.items() for step in sorted(steps)]
    assert float((got - want).norm()) < float((without - want).norm())


def test_the_bounds_are_what_was_seen_and_a_margin(plan: bw.CalibrationPlan) -> None:
    entry, config = plan.entries[0], plan.at(0.5, guarded=True)
    assert (config.policy, config.decide) == ("guarded", "joint")
    assert config.indicator_bounds == tuple(None if value is None else MARGIN * value for value in entry.indicators or ())
    assert plan.at(0.5).policy == "static"
    assert plan.at(0.5).indicator_bounds is None


def test_a_plan_keeps_its_indicators(plan: bw.CalibrationPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert bw.CalibrationPlan.load(tmp_path / "plan.json") == plan
    plan.at(0.5, guarded=True).save(tmp_path / "config.json")
    assert bw.CacheConfig.load(tmp_path / "config.json") == plan.at(0.5, guarded=True)


def test_one_context_is_guarded_in_a_bundle_too(model: OneStream, tmp_path: Path) -> None:
    def alone(model: Any, speed: float = 1.0) -> Tensor:
        return generate(model, speed=speed, contexts=False)

    plan = bw.calibrate(bw.transform(model, num_steps=STEPS), alone, budgets=(0.4,), anchors=3, guarded=True, progress=False)
    cached = bw.transform(model, plan.at(0.4, guarded=True), example_args=model.example())
    assert cached.cache_config.decide == "separate"
    bw.export(cached, tmp_path / "bundle", format="pt2")
    session = bw.load(tmp_path / "bundle", backend="torch", allow_code=True)
    for speed, leaves in ((1.0, False), (4.0, True)):
        assert torch.equal(alone(session, speed), alone(cached, speed))
        assert str(session.report()) == str(cached.report())
        assert bool(added(cached, plan.entries[0])["default"]) == leaves


def test_refusals(model: OneStream, plan: bw.CalibrationPlan, tmp_path: Path) -> None:
    with pytest.raises(
        bw.ConfigError, match=r"^guarded=True requires a transformed model, got OneStream\. Pass the result of transform\.$"
    ):
        bw.calibrate(model, generate, guarded=True, progress=False)
    unguarded = bw.calibrate(bw.transform(model), generate, budgets=(0.5,), progress=False)
    with pytest.raises(bw.ConfigError, match=r"^guarded=True requires a plan that was calibrated with guarded=True"):
        unguarded.at(0.5, guarded=True)
    with pytest.raises(bw.ExportError, match="decide='joint' cannot be exported"):
        bw.export(bw.transform(model, plan.at(0.5, guarded=True), example_args=model.example()), tmp_path / "bundle")
