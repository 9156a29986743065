"""The compact indicator on the model that was trained: what it takes, and how near it stays to the exact one."""

from __future__ import annotations

import data
import model as tiny
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

import bwcache_compile as bw

STEPS = 50


@pytest.fixture(scope="module")
def trained() -> WanTransformer3DModel:
    return tiny.load()


def indicators(models: list[bw.CachedModel], tokens: torch.Tensor, noise: torch.Tensor, steps: int) -> list[list[list[float]]]:
    """Run the first steps with every model in turn, all of them computed; return what each measured, context by context."""
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=tiny.SHIFT)
    scheduler.set_timesteps(STEPS)
    prompts = {"cond": tokens, "uncond": torch.zeros_like(tokens)}
    latents = noise
    for model in models:
        model.reset()
    for timestep in scheduler.timesteps[:steps]:
        out = {}
        for name, prompt in prompts.items():
            for model in models:
                with torch.no_grad(), model.cache_context(name):
                    (out[name],) = model(tiny.with_coordinates(latents), timestep.expand(1), prompt, return_dict=False)
        clean = out["uncond"] + tiny.GUIDANCE * (out["cond"] - out["uncond"])
        latents = scheduler.step((latents - clean) / (timestep / 1000), timestep, latents, return_dict=False)[0]
    contexts = [model.report().contexts.values() for model in models]
    return [[[r.indicator for r in context.steps if r.indicator is not None] for context in group] for group in contexts]


@pytest.mark.slow
def test_the_default_state_is_small(trained: WanTransformer3DModel) -> None:
    example = (tiny.with_coordinates(torch.zeros(1, 3, 8, 32, 32)), torch.ones(1), torch.zeros(1, data.OBJECTS, data.TOKEN_WIDTH))
    plan = bw.transform(trained, bw.CacheConfig(num_steps=STEPS), example_args=example).plan
    assert len(plan.blocks) == 12
    assert plan.hidden_states <= 1.5
    exact = bw.transform(trained, bw.CacheConfig.paper(num_steps=STEPS), example_args=example).plan
    assert exact.hidden_states > 13


def trigger(indicator: list[float], threshold: float) -> int | None:
    """Return the step that triggers; the first value is that of step 1."""
    return next((step for step, value in enumerate(indicator, 1) if value < threshold), None)


def together(contexts: list[list[float]]) -> list[float]:
    """Average the contexts, as `decide="joint"` does."""
    return [sum(values) / len(values) for values in zip(*contexts, strict=True)]


@pytest.mark.slow
def test_the_compact_indicator_triggers_with_the_exact_one(trained: WanTransformer3DModel) -> None:
    """At the default threshold, and where the contexts decide together inside the U.

    At other thresholds they can differ within the error asserted here: `benchmarks/indicator.py` counts how often.
    """
    compact = bw.transform(trained, bw.CacheConfig(num_steps=STEPS, threshold=0))
    exact = bw.transform(trained, bw.CacheConfig.paper(num_steps=STEPS, threshold=0))
    default = bw.CacheConfig().threshold
    errors, triggers = [], set()
    for seed in range(20):
        tokens = data.encode(data.draw_attributes(1, torch.Generator().manual_seed(seed)))
        ours, paper = indicators([compact, exact], tokens, tiny.draw_noise(1, seed), steps=8)
        for mine, theirs in zip(ours, paper, strict=True):
            errors += [abs(a - b) / b for a, b in zip(mine, theirs, strict=True)]
            assert trigger(mine, default) == trigger(theirs, default) == 1
        step = trigger(together(paper), 0.05)
        assert trigger(together(ours), 0.05) == step, f"seed {seed}"
        triggers.add(step)
    assert triggers >= {1, 7}, "the runs differ, so that the test shows something"
    assert max(errors) < 0.12
    assert sum(errors) / len(errors) < 0.03
