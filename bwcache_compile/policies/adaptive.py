"""Reuse for as long as the change that is to be expected stays below a threshold; for models that are not calibrated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bwcache_compile.errors import ConfigError
from bwcache_compile.policies.definitions import Parameter, Policy, SmallSlot, Values
from bwcache_compile.policies.thresholds import at_threshold, no_reuse

if TYPE_CHECKING:
    from torch import Tensor

    from bwcache_compile.config import CacheConfig

_LONGEST = 5
"""Steps reused in a row at most, where neither an interval nor the number of steps is given: the paper's 10 % of 50."""
_NO_END = 2**31 - 1


def adaptive(
    change: Tensor, computed_at: Tensor, step: Tensor, threshold: Tensor, longest: Tensor, warmup: Tensor, num_steps: Tensor
) -> tuple[Tensor, Tensor]:
    """Decide after a computed step how many of the following steps reuse: as many as change by less than the threshold together.

    The blocks are expected to go on changing at the rate at which they have changed since the computed step before.

    Args:
        change: float32[blocks]. The indicator is its mean.
        computed_at: int64[1], the computed step before, or -1.
        step: int64[1], the step just computed.
        threshold: float32[1], the largest change between two computed steps.
        longest: int64[1], steps reused in a row at most.
        warmup: int64[1], steps at the start that are computed.
        num_steps: int64[1]; the last step is computed.

    Returns:
        The step, to be the next one's `computed_at`, and the number of following steps that reuse, int64[1] each.
    """
    import torch

    indicator = change.mean().reshape(1)
    most = longest.to(torch.float32)
    following = torch.where(indicator > 0, torch.minimum(threshold * (step - computed_at) / indicator, most), most)
    left = torch.minimum(following.to(torch.int64), num_steps - 2 - step).clamp(min=0)
    active = (computed_at >= 0) & (step + 1 >= warmup) & (threshold > 0) & torch.isfinite(indicator)
    return step, torch.where(active, left, torch.zeros_like(step))


def _values(config: CacheConfig, num_steps: int | None) -> dict[str, Values]:
    if num_steps is None and config.reuse_fraction is not None:
        raise ConfigError("reuse_fraction needs the number of steps. Set CacheConfig(num_steps=...), or reuse_interval instead.")
    given = num_steps is not None or config.reuse_interval is not None
    return {
        "threshold": (float(config.threshold),),
        "longest": (config.resolved_interval(num_steps or 1) if given else _LONGEST,),
        "warmup": (config.warmup_steps,),
        "num_steps": (_NO_END if num_steps is None else num_steps,),
    }


ADAPTIVE = Policy(
    decide=adaptive,
    values=_values,
    parameters=(Parameter("threshold", "float32"), Parameter("longest"), Parameter("warmup"), Parameter("num_steps")),
    slots=(SmallSlot("computed_at", "int64", (1,), fill=-1),),
    at_threshold=at_threshold,
    no_reuse=no_reuse("the slowest change was {indicator} a step, at step {step}; a threshold above it would have reused there."),
)
