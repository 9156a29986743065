"""Calibration of real diffusers pipelines around tiny random models."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

import bwcache_compile as bw
from bwcache_compile.calibration.quality import psnr
from tests.calibration.helpers import replay
from tests.pipelines.cases import CASES, UNNAMED, Case

STEPS = 12


def generator_of(case: Case, pipe: Any) -> Any:
    def generate(model: nn.Module) -> Tensor:
        original = pipe.transformer
        pipe.transformer = model
        try:
            return case.run(pipe, case.widths[0], 6, num_inference_steps=STEPS)
        finally:
            pipe.transformer = original

    return generate


@pytest.mark.parametrize(
    ("name", "contexts"),
    [
        ("wan", ("cond", "uncond")),
        ("flux", ("cond", "uncond")),
        ("cogvideox", ("cond_uncond",)),
        ("sd3", ("default",)),
        ("kandinsky5", ("call_0", "call_1")),
    ],
)
def test_a_pipeline_is_calibrated(name: str, contexts: tuple[str, ...]) -> None:
    case = {**CASES, **UNNAMED}[name]
    model = case.model()
    pipe = case.pipeline(model)
    generate = generator_of(case, pipe)
    plan = bw.calibrate(model, generate, budgets=(0.5,), progress=False)
    (entry,) = plan.entries
    assert pipe.transformer is model
    assert plan.provenance.contexts == contexts
    assert plan.provenance.sampler.startswith("sampler recovered from ")
    assert len(plan.provenance.timesteps) == STEPS
    assert entry.rule == "fitted"
    full = generate(model)
    assert psnr(generate(replay(model, plan, entry)), full) == pytest.approx(entry.psnr, abs=0.1)


def test_a_scheduler_that_clips_is_named_and_calibrated_all_the_same() -> None:
    case = CASES["latte"]  # its DDIM clips what it predicts, and its model returns a variance too
    model = case.model()
    with pytest.warns(bw.CacheWarning, match=r"^the sampler's steps are not a linear combination of latents and outputs"):
        plan = bw.calibrate(model, generator_of(case, case.pipeline(model)), budgets=(0.5,), progress=False)
    assert plan.provenance.sampler.startswith("sampler not linear")
    assert plan.provenance.cost <= 4
