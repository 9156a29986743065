"""The compact indicator on the model that was trained: what it takes, and that it triggers where the exact one does."""

from __future__ import annotations

import dataclasses

import data
import model as tiny
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

import bwcache_compile as bw
from examples.quickstart import THRESHOLD

STEPS = 50


@pytest.fixture(scope="module")
def trained() -> WanTransformer3DModel:
    return tiny.load()


def trigger_steps(cached: bw.CachedModel, tokens: torch.Tensor, noise: torch.Tensor) -> dict[str, int]:
    """Generate until both contexts have triggered, and return where; `STEPS` if one never does."""
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=tiny.SHIFT)
    scheduler.set_timesteps(STEPS)
    prompts = {"cond": tokens, "uncond": torch.zeros_like(tokens)}
    states = {name: cached.init_state((tiny.with_coordinates(noise), torch.ones(1), tokens), {"return_dict": False}) for name in prompts}
    found = dict.fromkeys(prompts, STEPS)
    latents = noise
    for step, timestep in enumerate(scheduler.timesteps):
        out = {}
        for name, prompt in prompts.items():
            inputs = (tiny.with_coordinates(latents), timestep.expand(1), prompt)
            (out[name],), states[name] = cached.step(inputs, {"return_dict": False}, states[name])
            if states[name].reuse_until > step:
                found[name] = min(found[name], step)
                states[name] = dataclasses.replace(states[name], reuse_until=-1)  # keep computing: only the trigger counts here
        if all(at < STEPS for at in found.values()):
            break
        clean = out["uncond"] + tiny.GUIDANCE * (out["cond"] - out["uncond"])
        latents = scheduler.step((latents - clean) / (timestep / 1000), timestep, latents, return_dict=False)[0]
    return found


def test_the_default_state_is_small(trained: WanTransformer3DModel) -> None:
    example = (tiny.with_coordinates(torch.zeros(1, 3, 8, 32, 32)), torch.ones(1), torch.zeros(1, data.OBJECTS, data.TOKEN_WIDTH))
    plan = bw.transform(trained, bw.CacheConfig(num_steps=STEPS), example_args=example).plan
    assert len(plan.blocks) == 12
    assert plan.hidden_states <= 1.5
    exact = bw.transform(trained, bw.CacheConfig.paper(num_steps=STEPS), example_args=example).plan
    assert exact.hidden_states > 13


def test_the_compact_indicator_triggers_where_the_exact_one_does(trained: WanTransformer3DModel) -> None:
    compact = bw.transform(trained, bw.CacheConfig(num_steps=STEPS, threshold=THRESHOLD))
    exact = bw.transform(trained, bw.CacheConfig.paper(num_steps=STEPS, threshold=THRESHOLD))
    pairs = []
    for seed in range(20):
        tokens = data.encode(data.draw_attributes(1, torch.Generator().manual_seed(seed)))
        noise = tiny.draw_noise(1, seed)
        pairs.append((trigger_steps(compact, tokens, noise), trigger_steps(exact, tokens, noise)))
    assert [ours for ours, _ in pairs] == [paper for _, paper in pairs]
    assert all(1 < step < STEPS for _, paper in pairs for step in paper.values()), "the threshold is where the curve decides"
