"""A fixed mask of steps, and bounds on what is measured: beyond its bound, the next step is computed although the mask reuses it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bwcache_compile.policies.definitions import Parameter, Policy, Values
from bwcache_compile.policies.static import static

if TYPE_CHECKING:
    from torch import Tensor

    from bwcache_compile.config import CacheConfig
    from bwcache_compile.report import StepRecord


def guarded(mask: Tensor, bounds: Tensor, change: Tensor, step: Tensor) -> Tensor:
    """Count the entries of the mask that follow a step without a gap; none where the step's indicator is beyond its bound.

    Args:
        mask: int64[S], 1 reuses.
        bounds: float32[S], infinite where there is no bound.
        change: float32[blocks]. The indicator is its mean.
        step: int64[1], the step just computed.

    Returns:
        int64[1], how many of the following steps reuse.
    """
    import torch

    bound, following = bounds[step.clamp(max=bounds.shape[0] - 1)], static(mask, step)
    within = (bound == math.inf) | (change.mean().reshape(1) <= bound)  # an indicator that is not finite is beyond every bound
    return torch.where(within, following, torch.zeros_like(step))


def _values(config: CacheConfig, num_steps: int | None) -> dict[str, Values]:
    assert config.steps_mask is not None
    bounds = config.indicator_bounds or (None,) * len(config.steps_mask)
    return {"mask": config.steps_mask, "bounds": tuple(math.inf if bound is None else bound for bound in bounds)}


def _at_threshold(config: CacheConfig, threshold: float, num_steps: int) -> CacheConfig:
    assert config.steps_mask is not None
    return dataclasses.replace(config, indicator_bounds=(threshold,) * len(config.steps_mask))


def _added(config: CacheConfig, steps: Sequence[StepRecord]) -> tuple[str, ...]:
    """Say which steps were computed that the mask reuses. Where the cache was lost (no gap), an event says so already."""
    mask, bounds = config.steps_mask or (), config.indicator_bounds or ()
    said, before = [], -1
    for record in steps:
        if record.computed and record.gap is not None and record.step < len(mask) and mask[record.step] and before < len(bounds):
            said.append(f"step {record.step} was computed instead of reused: the indicator of step {before} was above {bounds[before]:.3g}")
        before = record.step if record.computed else before
    return tuple(said)


GUARDED = Policy(
    decide=guarded,
    values=_values,
    parameters=(Parameter("mask", per_step=True), Parameter("bounds", "float32", per_step=True)),
    at_threshold=_at_threshold,
    explain=_added,
)
