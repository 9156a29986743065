"""From a calibration to settings: what a plan gives runs as it was fitted, and is refused where it does not belong."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bwcache_compile as bw
from tests.calibration.helpers import guided_euler
from tests.models import OneStream

STEPS = 12


@pytest.fixture(scope="module")
def model() -> OneStream:
    torch.manual_seed(0)
    return OneStream().eval().requires_grad_(False)


generate = functools.partial(guided_euler, steps=STEPS)


@pytest.fixture(scope="module", params=["output", "blocks"])
def cut(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def plan(model: OneStream, cut: Any) -> bw.CalibrationPlan:
    cached = bw.transform(model, num_steps=STEPS)
    return bw.calibrate(cached, generate, budgets=(0.5, 0.34), anchors=3, cut=cut, progress=False)


def test_a_configured_model_does_what_was_calibrated(model: OneStream, plan: bw.CalibrationPlan) -> None:
    cached = bw.transform(model, num_steps=STEPS)
    generate(cached)
    full = generate_plain(model)
    for budget, entry in zip((0.5, 0.34), plan.entries, strict=True):
        cached.configure(plan.at(budget))
        result = generate(cached)
        error = float((result - full).pow(2).mean().sqrt())
        peak = 2.0 if float(full.abs().max()) <= 1 else float(full.max() - full.min())
        found = 20 * torch.log10(torch.tensor(peak / error)).item()
        assert found == pytest.approx(entry.psnr, abs=0.05), "the graphs sum the anchors in float32, in another order"
        assert all(context.computed == entry.computed for context in cached.report().contexts.values())
    assert cached.report().captures == 1


def generate_plain(model: OneStream) -> Tensor:
    """Run every step of the model itself, which has no contexts."""
    return generate(bw.transform(model, num_steps=STEPS, threshold=0))


@pytest.mark.parametrize(
    ("format", "options"), [("onnx", {}), pytest.param("pt2", {"backend": "torch", "allow_code": True}, marks=pytest.mark.slow)]
)
def test_a_bundle_carries_mask_and_table(
    model: OneStream, plan: bw.CalibrationPlan, format: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    cached = bw.transform(model, plan.at(0.5), example_args=model.example())
    want = generate(cached)
    cached.reset()
    bw.export(cached, tmp_path / "bundle", format=format)
    session = bw.load(tmp_path / "bundle", **options)

    class Called:
        cache_context = session.cache_context

        def __call__(self, *args: Tensor) -> Tensor:
            return torch.as_tensor(session(*(arg if format == "pt2" else arg.numpy() for arg in args)))

    torch.testing.assert_close(generate(Called()), want, rtol=1e-4, atol=1e-4)
    with pytest.raises(bw.StateError, match=r"these settings were calibrated for timestep 1 at step 0, but this call has timestep 1\.3"):
        generate(Called(), shift=0.3)


def test_refused_where_it_does_not_belong(model: OneStream, plan: bw.CalibrationPlan) -> None:
    cached = bw.transform(model, plan.at(0.5))
    with pytest.raises(
        bw.StateError, match=r"these settings were calibrated for timestep 1 at step 0, but this call has timestep 1\.3\. Calibrate"
    ):
        generate(cached, shift=0.3)
    other = OneStream().eval().requires_grad_(False)
    with torch.no_grad():
        other.head.weight.add_(1)
    with pytest.raises(
        bw.StateError, match=r"these settings were calibrated for OneStream, float32, weights [0-9a-f]+, but the model is OneS"
    ):
        bw.transform(other).configure(plan.at(0.5))


def test_another_number_of_steps_is_refused_and_says_what_to_do(model: OneStream, plan: bw.CalibrationPlan) -> None:
    cached = bw.transform(model, plan.at(0.5))
    advice = (
        r"must be equal\.\n  The mask was calibrated for 12 steps\. Generate with 12, or calibrate again with a generate that makes 8\.$"
    )
    message = rf"^steps_mask has 12 entries but num_inference_steps is 8; they {advice}"
    with cached.cache_context("cond", num_inference_steps=8), pytest.raises(bw.ConfigError, match=message):
        cached(*model.example())
    with pytest.raises(bw.ConfigError, match=rf"^steps_mask has 12 entries but num_steps is 8; they {advice}"):
        cached.reset(num_steps=8)


def test_a_saved_plan_is_read_back(plan: bw.CalibrationPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert bw.CalibrationPlan.load(tmp_path / "plan.json") == plan
