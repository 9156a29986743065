"""A plan that is run on other prompts: its targets go by what was found there."""

from __future__ import annotations

import dataclasses
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bwcache_compile as bw
from bwcache_compile.calibration.quality import psnr
from tests.models import OneStream

STEPS = 12


@pytest.fixture(scope="module")
def model() -> OneStream:
    torch.manual_seed(0)
    return OneStream(depth=3).eval().requires_grad_(False)


def prompted(seed: int, steps: int = STEPS) -> Any:
    def generate(model: Any) -> Tensor:
        times = torch.linspace(1, 0.1, steps)
        latents = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(seed))
        for now, following in zip(times, [*times[1:], torch.tensor(0.0)], strict=True):
            latents = latents + (following - now) * torch.as_tensor(model(latents, now.reshape(1)))
        return latents

    return generate


def fewer(seed: int) -> Any:
    return lambda model, steps: prompted(seed, steps)(model)


@pytest.fixture(scope="module")
def plan(model: OneStream) -> bw.CalibrationPlan:
    return bw.calibrate(bw.transform(model), prompted(1), budgets=(0.5, 0.34), anchors=3, progress=False)


def test_each_entry_is_run_on_each_prompt_as_its_settings_run(model: OneStream, plan: bw.CalibrationPlan) -> None:
    cached = bw.transform(model, threshold=0.3)
    seeds = (2, 3, 4)
    verified = bw.verify_plan(plan, cached, [prompted(seed) for seed in seeds], [fewer(seed) for seed in seeds])
    assert cached.cache_config == bw.CacheConfig.of(None, threshold=0.3), "the model that it was given is as it was"
    with torch.no_grad():
        for entry, before in zip(verified.entries, plan.entries, strict=True):
            running = bw.transform(model, plan.settings(before))
            for seed, ours, plain in zip(seeds, entry.unseen, entry.unseen_fewer_steps, strict=True):
                running.reset()
                full = prompted(seed)(model)
                assert ours == psnr(prompted(seed)(running), full)
                assert plain == psnr(prompted(seed, entry.computed)(model), full)
            assert dataclasses.replace(entry, unseen=(), unseen_fewer_steps=()) == before


def test_targets_go_by_the_unseen_prompts(plan: bw.CalibrationPlan, tmp_path: Path) -> None:
    most, least = plan.entries
    plan = dataclasses.replace(
        plan, entries=(dataclasses.replace(most, unseen=(39.0, 41.0, 43.0)), dataclasses.replace(least, unseen=(30.0,)))
    )
    sure = 41 - 2.92 * 2 / math.sqrt(3)  # Student's t of two degrees of freedom
    assert [entry.psnr_floor for entry in plan.entries] == [pytest.approx(sure), 30.0]
    assert plan.entry(psnr=30).computed == least.computed
    assert plan.entry(psnr=37.6).computed == most.computed
    with pytest.warns(bw.CacheWarning, match=rf"no entry of this plan meets psnr=40; .* \({sure:.1f} dB"):
        plan.entry(psnr=40)
    assert f"on 3 unseen prompts, {most.computed} computed steps: 41.0 dB ± 1.2\n" in str(plan)
    assert f"on 1 unseen prompt, {least.computed} computed steps: 30.0 dB ± 0.0" in str(plan)
    plan.save(tmp_path / "plan.json")
    assert bw.CalibrationPlan.load(tmp_path / "plan.json") == plan


def test_fewer_steps_that_win_on_unseen_prompts_are_advised(plan: bw.CalibrationPlan) -> None:
    entry = dataclasses.replace(plan.entries[0], unseen=(40.0, 42.0), unseen_fewer_steps=(41.0, 43.0))
    assert entry.fewer_steps_wins
    assert f"{entry.computed} plain steps: {statistics.mean(entry.unseen_fewer_steps):.1f} dB" in entry.verified
    assert not dataclasses.replace(entry, unseen_fewer_steps=(39.0, 42.5)).fewer_steps_wins


def test_what_cannot_be_verified_is_refused(model: OneStream, plan: bw.CalibrationPlan) -> None:
    cached = bw.transform(model)
    with pytest.raises(bw.ConfigError, match=r"^verify_plan requires a transformed model, got OneStream\. Pass the result of transform\.$"):
        bw.verify_plan(plan, model, [prompted(2)])
    with pytest.raises(bw.ConfigError, match=r"^prompts must be a sequence of functions like `generate`"):
        bw.verify_plan(plan, cached, [])
    with pytest.raises(bw.ConfigError, match=r"^fewer_steps must hold one function for each prompt: 1 prompts, got 2"):
        bw.verify_plan(plan, cached, [prompted(2)], [fewer(2), fewer(3)])
    with pytest.raises(bw.ConfigError, match=r"^prompts\[1\] ran no step of the model that it was given, but the plan has 12 steps"):
        bw.verify_plan(plan, cached, [prompted(2), lambda given: prompted(3)(model)])
    other = OneStream(depth=3, width=16).eval().requires_grad_(False)
    with pytest.raises(bw.StateError, match="these settings were calibrated for OneStream"):
        bw.verify_plan(plan, bw.transform(other), [prompted(2)])
