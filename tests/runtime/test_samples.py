"""Samples of a batch that decide by themselves, beside the same samples run alone."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import bwcache_compile as bw
from tests.models import OneStream

STEPS, BATCH = 30, 5
ADAPTIVE = bw.CacheConfig(policy="adaptive", threshold=0.1, reuse="taylor", num_steps=STEPS, batch_reduce="per_sample")
SCHEDULE = bw.CacheConfig(threshold=0.15, reuse="output", num_steps=STEPS, reuse_interval=2, warmup_steps=1, batch_reduce="per_sample")


def sample(number: int, step: int, tokens: int = 40) -> tuple[Tensor, Tensor]:
    """One sample of one step: each moves at a pace of its own, some by fits and starts."""
    generator = torch.Generator().manual_seed(100 + number)
    base, drift = torch.randn(2, 1, tokens, 4, generator=generator)
    moved = 0.3 * (number + 1) * (0.5 + 0.07 * number) ** step * (1 + step * (number + 3) % 5)
    return base + moved * drift, torch.full((1,), 1 - step / 32)


def batch(numbers: list[int], steps: list[int]) -> tuple[Tensor, Tensor]:
    parts = [sample(number, step) for number, step in zip(numbers, steps, strict=True)]
    return torch.cat([x for x, _ in parts]), torch.cat([t for _, t in parts])


@functools.cache
def single(config: bw.CacheConfig) -> bw.CachedModel:
    """Return a cached model for batches of one sample; all models of a class have the same weights."""
    return bw.transform(OneStream().eval(), dataclasses.replace(config, batch_reduce="joint"))


@functools.cache
@torch.no_grad()
def alone(config: bw.CacheConfig, number: int, steps: int = STEPS) -> tuple[list[Tensor], str]:
    """Return the outputs of a sample that is run by itself, and which steps it computed."""
    cached = single(dataclasses.replace(config, num_steps=None))
    outputs, name = [], f"{number} of {config.num_steps}, {steps} steps"
    for step in range(steps):
        with cached.cache_context(name, num_inference_steps=config.num_steps):
            outputs.append(cached(*sample(number, step)))
    return outputs, pattern(cached, name)


def pattern(cached: Any, name: str) -> str:
    return "".join("#" if record.computed else "." for record in cached.report().contexts[name].steps)


def close(actual: Tensor, expected: Tensor) -> None:
    assert float((actual - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize(
    "config",
    [ADAPTIVE, SCHEDULE],
    ids=["adaptive", "schedule"],
)
def test_each_sample_decides_as_it_does_alone(model: OneStream, config: bw.CacheConfig) -> None:
    cached = bw.transform(model, config)
    with torch.no_grad():
        outputs = [cached(*batch(list(range(BATCH)), [step] * BATCH)) for step in range(STEPS)]
    patterns = set()
    for number in range(BATCH):
        expected, computed = alone(config, number)
        assert pattern(cached, f"{number}/default") == computed
        patterns.add(computed)
        for step in range(STEPS):
            close(outputs[step][number : number + 1], expected[step])
    assert len(patterns) > 2, "the samples differ"
    assert set(cached.batch_sizes) <= {1, 2, 4, BATCH}
    assert len(cached.cached_programs) <= 2, "one for a single sample, one of dynamic sizes"
