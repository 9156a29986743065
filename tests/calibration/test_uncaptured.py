"""Calibration of models without a whole graph: it needs their outputs alone."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bwcache_compile as bw
from bwcache_compile.calibration.quality import psnr
from tests.calibration.helpers import guided_euler
from tests.models import OneStream
from tests.region.test_region import Scale
from tests.uncaptured import same

STEPS, BUDGET = 12, 0.5


class Branching(OneStream):
    """Branches on the value of the time, which no graph of it can; without the branch it has the same weights and can be captured."""

    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.branches = branches
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.branches and t.mean().item() > 2:  # never at the times of a run, so that both models return the same
            x = x * 0
        return super().forward(x, t)


generate = torch.no_grad()(functools.partial(guided_euler, steps=STEPS))


@pytest.fixture(scope="module")
def full() -> Tensor:
    return generate(bw.transform(Branching(True), num_steps=STEPS, threshold=0, capture="opaque"))


@pytest.fixture(params=["opaque", "region"])
def capture(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def plan() -> bw.CalibrationPlan:
    cached = bw.transform(Branching(True), num_steps=STEPS, capture="region")
    made = bw.calibrate(cached, generate, budgets=(BUDGET,), progress=False)
    assert cached.cache_config == bw.CacheConfig(num_steps=STEPS), "the model that it was given is as it was"
    return made


def test_a_calibrated_plan_beats_holding(plan: bw.CalibrationPlan, capture: Any, full: Tensor) -> None:
    """By 20 dB and more, at the same steps and at evenly spaced ones; 38 dB and more were found."""
    cached = bw.transform(Branching(True), num_steps=STEPS, capture=capture)
    cached.configure(plan.at(BUDGET))
    found = psnr(generate(cached), full)
    (entry,) = plan.entries
    assert found == pytest.approx(entry.psnr, abs=0.05), "it runs as it was calibrated"
    for context in cached.report().contexts.values():
        assert (context.computed, len(context.steps)) == (6, STEPS)
    mask = tuple(int(not computes) for computes in entry.mask)
    even = tuple(step % 2 for step in range(STEPS))
    for steps_mask in (mask, even):
        held = bw.transform(Branching(True), policy="static", steps_mask=steps_mask, cut="output", capture=capture)
        assert found > psnr(generate(held), full) + 20


def test_the_plan_is_that_of_a_whole_capture(plan: bw.CalibrationPlan) -> None:
    """Either way: the same mask and table give the same video, within the rounding of sums in another order."""
    plain = Branching(False)
    whole = bw.transform(plain, num_steps=STEPS)
    theirs = bw.calibrate(whole, generate, budgets=(BUDGET,), progress=False)
    assert theirs.entries == plan.entries
    assert theirs.provenance.model == plan.provenance.model
    made = [generate(bw.transform(plain, plan.at(BUDGET)))]
    made += [generate(bw.transform(Branching(True), theirs.at(BUDGET), capture=capture)) for capture in ("opaque", "region")]
    for video in made[1:]:
        torch.testing.assert_close(video, made[0], rtol=1e-6, atol=1e-6)


def test_a_guarded_plan() -> None:
    cached = bw.transform(Branching(True), num_steps=STEPS, capture="opaque")
    plan = bw.calibrate(cached, generate, budgets=(BUDGET,), guarded=True, progress=False)
    (entry,) = plan.entries
    assert [value is not None for value in entry.indicators or ()] == [computes and step > 0 for step, computes in enumerate(entry.mask)]
    plain = bw.transform(Branching(True), plan.at(BUDGET), capture="region")
    cached.configure(plan.at(BUDGET, guarded=True))
    assert torch.equal(generate(cached), generate(plain)), "as calibrated, nothing is added"
    tight = tuple(None if bound is None else bound / 4 for bound in cached.cache_config.indicator_bounds or ())
    cached.configure(indicator_bounds=tight)
    generate(cached)
    one, other = cached.report().contexts.values()
    assert one.computed == other.computed > entry.computed
    assert any("was computed instead of reused" in warning for warning in cached.report().warnings)


def test_refused_where_it_does_not_belong(plan: bw.CalibrationPlan, capture: Any) -> None:
    cached = bw.transform(Branching(True), plan.at(BUDGET), capture=capture)
    with pytest.raises(bw.StateError, match=r"were calibrated for timestep 1 at step 0, but this call has timestep 1\.3\. Calibrate"):
        generate(cached, shift=0.3)
    other = Branching(True)
    other.head.weight.add_(1)
    said = "were calibrated for Branching, float32, weights [0-9a-f]+, but the model is Branching"
    with pytest.raises(bw.StateError, match=said):
        bw.transform(other, plan.at(BUDGET), capture=capture)
    mine = bw.transform(other, num_steps=STEPS, capture=capture)
    with pytest.raises(bw.StateError, match=said):
        mine.configure(plan.at(BUDGET))
    assert mine.cache_config == bw.CacheConfig(num_steps=STEPS)


class Resisting(nn.Module):
    """Takes an object and sorts on the host; it has no blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, t: Tensor, scale: Scale) -> Any:
        order = sorted(range(6), key=t.expand(6).tolist().__getitem__)
        return {"sample": self.down(torch.tanh(self.up(x[:, order] * (1 + t)))) * scale.value, "scale": 2}


def test_any_model_that_runs_is_calibrated() -> None:
    def make(model: Any) -> Tensor:
        x, scale = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0)), Scale(0.5)
        with torch.no_grad():
            for step in range(STEPS):
                returned = model(x, torch.full((1,), 1 - step / STEPS), scale=scale)
                assert returned["scale"] == 2
                x = x - 0.1 * returned["sample"]
        return x

    model = Resisting().eval()
    cached = bw.transform(model, num_steps=STEPS, policy="adaptive", capture="opaque")
    plan = bw.calibrate(cached, make, budgets=(0.5,), progress=False)
    cached.configure(plan.at(0.5))
    found, want = make(cached), make(model)
    assert psnr(found, want) == pytest.approx(plan.entries[0].psnr, abs=0.05)
    assert cached.report().contexts["default"].computed == STEPS // 2
    assert same([make(cached)], [found]), "another run"


def test_weights_that_an_offload_hook_took_away() -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    model = accelerate.cpu_offload(Branching(True), execution_device=torch.device("cpu"))
    cached = bw.transform(model, num_steps=STEPS, capture="opaque")
    with pytest.raises(bw.ConfigError, match=r"of Branching is on the meta device.*Calibrate before the weights are offloaded"):
        bw.calibrate(cached, generate, budgets=(BUDGET,), progress=False)


def test_a_plan_is_verified(plan: bw.CalibrationPlan, capture: Any) -> None:
    cached = bw.transform(Branching(True), num_steps=STEPS, capture=capture)
    (entry,) = bw.verify_plan(plan, cached, [generate]).entries
    assert entry.unseen == (pytest.approx(entry.psnr, abs=0.05),)
    assert cached.cache_config == bw.CacheConfig(num_steps=STEPS)
