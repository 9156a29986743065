"""How the tests of the runtime run a cached model, and what they say of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import bwcache_compile as bw
from tests.models import OneStream

STATIC = bw.CacheConfig(policy="static", steps_mask=(0, 1, 1, 0, 1, 0))


@torch.no_grad()
def run(module: nn.Module, *inputs: Any) -> Any:
    return module(*inputs)


def generation(cached: bw.CachedModel, model: OneStream, steps: int = 6, name: str | None = None, shift: int = 0) -> list[Tensor]:
    outputs = []
    for step in range(steps):
        if name is None:
            outputs.append(run(cached, *model.example(step=step + shift)))
        else:
            with cached.cache_context(name):
                outputs.append(run(cached, *model.example(step=step + shift)))
    return outputs


def pattern(cached: bw.CachedModel, name: str = "default") -> str:
    return "".join("#" if record.computed else "." for record in cached.report().contexts[name].steps)
