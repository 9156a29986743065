"""The paper's schedule: reuse begins once the blocks' features hardly change, in equal intervals, with a protected tail."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bwcache_compile.errors import ConfigError
from bwcache_compile.policies.arithmetic import quotient
from bwcache_compile.policies.definitions import Parameter, Policy, SmallSlot, Values
from bwcache_compile.policies.thresholds import at_threshold, no_reuse

if TYPE_CHECKING:
    from torch import Tensor

    from bwcache_compile.config import CacheConfig

_LARGEST = 2**63 - 1
"""Graphs count in 64 bits."""


def schedule(
    change: Tensor,
    trigger: Tensor,
    step: Tensor,
    threshold: Tensor,
    interval: Tensor,
    tail_numerator: Tensor,
    tail_denominator: Tensor,
    warmup: Tensor,
    num_steps: Tensor,
) -> tuple[Tensor, Tensor]:
    """Decide after a computed step how many of the following steps reuse (the paper's schedule, eq. 7).

    Args:
        change: float32[blocks]. The indicator is its mean.
        trigger: int64[1], the step that triggered, or -1.
        step: int64[1], the step just computed.
        threshold: float32[1].
        interval: int64[1], reused steps between two computed ones.
        tail_numerator: int64[1]; with the next argument, the protected share of the elapsed steps as an exact ratio.
        tail_denominator: int64[1].
        warmup: int64[1].
        num_steps: int64[1].

    Returns:
        The trigger afterwards and the number of following steps that reuse, int64[1] each.
    """
    import torch

    indicator = change.mean().reshape(1)
    finite = torch.isfinite(indicator)
    fires = (trigger < 0) & (step > 0) & (step >= warmup) & finite & (indicator < threshold)
    trigger = torch.where(fires, step, trigger)
    period = interval + 1
    refresh = step + period - torch.remainder(step - trigger, period)
    tail = num_steps - quotient(tail_numerator * trigger, tail_denominator)
    stop = torch.minimum(refresh, torch.maximum(tail, step + 1))
    active = (trigger >= 0) & finite
    return trigger, torch.where(active, stop - step - 1, torch.zeros_like(step))


def _values(config: CacheConfig, num_steps: int | None) -> dict[str, Values]:
    if num_steps is None:
        raise ConfigError(
            "policy='schedule' needs the number of steps. Set CacheConfig(num_steps=...),"
            " call cached.reset(num_steps=...), or pass num_inference_steps to cache_context."
        )
    numerator, denominator = config.tail_ratio()
    if numerator * num_steps > _LARGEST:
        raise ConfigError(f"tail is {config.tail!r}; its exact fraction times {num_steps} steps does not fit in 64 bits. Use fewer digits.")
    return {
        "threshold": (float(config.threshold),),
        "interval": (config.resolved_interval(num_steps),),
        "tail_numerator": (numerator,),
        "tail_denominator": (denominator,),
        "warmup": (config.warmup_steps,),
        "num_steps": (num_steps,),
    }


SCHEDULE = Policy(
    decide=schedule,
    values=_values,
    parameters=(
        Parameter("threshold", "float32"),
        Parameter("interval"),
        Parameter("tail_numerator"),
        Parameter("tail_denominator"),
        Parameter("warmup"),
        Parameter("num_steps"),
    ),
    slots=(SmallSlot("trigger", "int64", (1,), fill=-1),),
    at_threshold=at_threshold,
    no_reuse=no_reuse("the smallest indicator was {indicator} at step {step}; a threshold above it would have triggered there."),
)
