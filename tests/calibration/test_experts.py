"""Two models in one generation, each for a part of its steps: a plan for each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bwcache_compile as bw
from bwcache_compile.calibration.quality import psnr
from tests.models import OneStream
from tests.pipelines.cases import CASES

STEPS = 12


def scaled(model: nn.Module) -> nn.Module:
    """Return a model of the same class with other weights."""
    model.load_state_dict({name: value * 1.2 for name, value in model.state_dict().items()})
    return model


class Experts:
    """A video that two models make: of diffusers' pipeline of Wan 2.2, or of a loop that numbers no steps."""

    def __init__(self, kind: str) -> None:
        self.case = CASES["wan"]
        torch.manual_seed(0)
        make = self.case.model if kind == "pipeline" else lambda: OneStream(depth=2).eval()
        self.high, self.low = make().requires_grad_(False), scaled(make()).requires_grad_(False)
        self.run: Callable[[Any, Any], Tensor] = self.pipeline if kind == "pipeline" else self.loop

    def pipeline(self, high: Any, low: Any) -> Tensor:
        pipe = self.case.pipeline(high)
        pipe.register_modules(transformer_2=low)
        pipe.register_to_config(boundary_ratio=0.5)
        return self.case.run(pipe, 32, 6, num_inference_steps=STEPS)

    def loop(self, high: Any, low: Any) -> Tensor:
        latents = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(1))
        for time in torch.linspace(1, 0.1, STEPS):
            model = high if time > 0.5 else low
            latents = latents - 0.1 * model(latents, time.reshape(1))
        return latents


@pytest.fixture(scope="module", params=[pytest.param("pipeline", marks=pytest.mark.zoo), "loop"])
def experts(request: pytest.FixtureRequest) -> Experts:
    return Experts(request.param)


@pytest.fixture(scope="module")
def plans(experts: Experts) -> tuple[bw.CalibrationPlan, bw.CalibrationPlan]:
    high = bw.calibrate(experts.high, lambda model: experts.run(model, experts.low), budgets=(0.5,), anchors=3, progress=False)
    low = bw.calibrate(experts.low, lambda model: experts.run(experts.high, model), budgets=(0.5,), anchors=3, progress=False)
    return high, low


@torch.no_grad()
def test_each_model_has_a_plan_over_its_own_steps(
    experts: Experts, plans: tuple[bw.CalibrationPlan, bw.CalibrationPlan], tmp_path: Path
) -> None:
    high, low = plans
    assert high.steps + low.steps == STEPS
    named = experts.run == experts.pipeline
    assert low.provenance.step_indices == tuple(range(high.steps, STEPS) if named else range(low.steps))
    assert high.provenance.num_steps == (STEPS if named else high.steps)
    for plan in plans:
        assert plan.entries[0].rule == "fitted"
        plan.save(tmp_path / "plan.json")
        assert bw.CalibrationPlan.load(tmp_path / "plan.json") == plan
    full = experts.run(experts.high, experts.low)
    first, second = bw.transform(experts.high, high.at(0.5)), bw.transform(experts.low, low.at(0.5))
    assert psnr(experts.run(first, experts.low), full) == pytest.approx(high.entries[0].psnr, abs=0.1), "the table was used"
    assert psnr(experts.run(experts.high, second), full) == pytest.approx(low.entries[0].psnr, abs=0.1), "the table was used"
    both = experts.run(first, second)
    for cached, plan in ((first, high), (second, low)):
        for context in cached.report().contexts.values():
            assert [record.computed for record in context.steps] == list(plan.entries[0].mask)
            assert [record.step for record in context.steps] == list(plan.provenance.step_indices)
        assert cached.report().warnings == ()
    assert torch.equal(experts.run(first, second), both), "a second generation"
    assert psnr(both, full) > min(high.entries[0].psnr, low.entries[0].psnr) - 6, "both errors add up to twice the larger one at most"


@torch.no_grad()
def test_another_boundary_is_refused(experts: Experts, plans: tuple[bw.CalibrationPlan, bw.CalibrationPlan]) -> None:
    low = bw.transform(experts.low, plans[1].at(0.5))
    if experts.run == experts.pipeline:
        first, last = plans[1].provenance.step_indices[0], STEPS - 1
        message = rf"for a model that runs at steps {first} to {last} of {STEPS}, but it was called at step 0\. Calibrate with this bound"
    else:
        message = r"these settings were calibrated for timestep 0\.\d+ at step 0, but this call has timestep 1\."
    with pytest.raises(bw.StateError, match=message):
        experts.run(low, low)
