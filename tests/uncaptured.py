"""What the tests of models without a whole graph share: settings, runs, and a check that contexts and runs leave nothing in one another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import bwcache_compile as bw
from tests.models import OneStream

STEPS = 6
MASK = (0, 0, 1, 0, 1, 1)
STATIC = bw.CacheConfig(policy="static", steps_mask=MASK)
COMPUTE = bw.CacheConfig(num_steps=STEPS, threshold=0)


def inputs(step: int, batch: int = 2) -> tuple[Tensor, ...]:
    return OneStream().example(batch, step=step)


@torch.no_grad()
def outputs(model: Any, steps: int = STEPS, **kwargs: Any) -> list[Tensor]:
    return [model(*model.example(2, step=step), **kwargs) for step in range(steps)]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def check_contexts(cached: Any) -> None:
    """Run two contexts alone, break one off, and run both in turn: each gives what it gave alone."""

    def run(name: str, scale: float, steps: int = STEPS) -> list[Tensor]:
        made = []
        for step in range(steps):
            x, t = inputs(step)
            with torch.no_grad(), cached.cache_context(name):
                made.append(cached(x * scale, t))
        return made

    alone = {name: run(name, scale) for name, scale in (("cond", 1.0), ("uncond", -0.5))}
    run("cond", 3.0, steps=4)  # broken off
    for step in range(STEPS):  # the calls of both contexts take turns
        for name, scale in (("cond", 1.0), ("uncond", -0.5)):
            x, t = inputs(step)
            with torch.no_grad(), cached.cache_context(name):
                assert torch.equal(cached(x * scale, t), alone[name][step]), (name, step)


def check_time_as_a_number(cached: Any, model: Any) -> None:
    """Give the time as a Python number, in a run that is broken off and in another one."""
    with torch.no_grad():
        for _ in range(2):  # the first run is broken off
            for step in range(5):
                x, t = inputs(step)
                got = cached(x, float(t[0]))
                assert torch.equal(got, model(x, float(t[0]))) != bool(MASK[step]), step
