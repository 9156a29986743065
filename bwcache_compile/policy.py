"""Indicator, policies and ways of reusing, as pure functions of tensors. Reuse is decided here and nowhere else.

The functions are traced into the graphs, so torch, ONNX Runtime and TensorRT decide alike. Scalars are tensors of
shape [1]: int64 for steps and counts, float32 for the indicator and the threshold. A trigger of -1 means "not yet".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import SymInt, Tensor

from bwcache_compile.config import CacheConfig, policy_dtype
from bwcache_compile.size_expressions import largest, smallest


def sampled_tokens(count: int | SymInt, stride: int, block: int, device: torch.device | None = None) -> Tensor:
    """Choose one token in every stratum of `stride`, at a hashed place that differs from block to block.

    A plain stride aliases with the token grid. Letting each block look elsewhere makes the mean over blocks cover
    `blocks` times as many tokens for the same memory. A closed form, so that a graph of open sizes can hold it too.

    Args:
        count: Tokens in all (batch times sequence).
        stride: Tokens per stratum.
        block: Position of the block among the measured ones.
        device: Where the places are wanted.

    Returns:
        int64[max(1, count // stride)], increasing, within [0, count).
    """
    strata = torch.arange(largest(1, count // stride), device=device)
    width = smallest(stride, count)
    mixed = (strata + 7919 * block + 1) * 2654435761 % 2**32  # Knuth's multiplicative hash
    return strata * stride + quotient(mixed * width, 2**32)


def quotient(a: Tensor, b: int | Tensor) -> Tensor:
    """Divide int64 numbers, rounded down, where a >= 0, b > 0 and the result is below 2**20.

    Without shifts and integer divisions, which runtimes take apart in their own ways or do not know; the half makes
    up for a division that is not rounded exactly.
    """
    return ((a - a % b).to(torch.float32) / b + 0.5).to(torch.int64)


def relative_change(features: Sequence[Tensor], references: Sequence[Tensor]) -> Tensor:
    """L1rel of each measured block against its last computed features (paper, eq. 5-6).

    Sums are float32 whatever the dtype: a float16 sum overflows and would read as "no change". Against the zeros of a
    fresh state the result is infinite or NaN, which every policy takes for "changed".

    Args:
        features: One tensor per measured block, any floating dtype and shape.
        references: The same blocks at the last computed step.

    Returns:
        float32[blocks].
    """
    ratios = []
    for feature, reference in zip(features, references, strict=True):
        old = reference.float()
        ratios.append((feature.float() - old).abs().sum() / old.abs().sum())
    return torch.stack(ratios)


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
        change: float32[blocks], see `relative_change`. The indicator is its mean.
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


def static(mask: Tensor, step: Tensor) -> Tensor:
    """Count the entries of `mask` (int64[S], 1 reuses) that follow `step` without a gap.

    Returns:
        int64[1], how many of the following steps reuse.
    """
    places = torch.arange(mask.shape[0], device=mask.device)
    computes = (places > step) & (mask == 0)
    following = torch.where(computes, places, torch.full_like(places, mask.shape[0]))
    return following.min().reshape(1) - step - 1


def policy_parameters(config: CacheConfig, num_steps: int | None, device: torch.device | None = None) -> tuple[Tensor, ...]:
    """Return the values of the graph's `policy_*` inputs, in their order.

    Raises:
        ConfigError: The policy needs the number of steps and it is not known.
    """
    values = config.policy_values(num_steps)
    return tuple(torch.tensor(value, dtype=getattr(torch, policy_dtype(name)), device=device) for name, value in values.items())


def residual(output: Tensor, source: Tensor) -> Tensor:
    """What the region added to its input; kept instead of the output."""
    return output - source


def add_residual(source: Tensor, kept: Tensor) -> Tensor:
    """Input of this step plus what the region last added to its input."""
    return source + kept


def extrapolate(last: Tensor, previous: Tensor, times: Tensor, now: Tensor) -> Tensor:
    """Continue the line through the last two computed outputs, in float32; hold until two different times are known.

    Args:
        last: Output at the last computed step.
        previous: Output at the computed step before it.
        times: float32[2], their times in that order; NaN where there is none.
        now: float32[1], the time of this step, in the same unit.

    Returns:
        Tensor like `last`.
    """
    span = times[0] - times[1]
    weight = (now.reshape(()) - times[0]) / span
    weight = torch.where(torch.isfinite(weight), weight, torch.zeros_like(weight))
    line = last.float() + weight * (last.float() - previous.float())
    # before the second anchor `previous` is zeros, and 0 * x holds exactly
    return line.to(last.dtype)
