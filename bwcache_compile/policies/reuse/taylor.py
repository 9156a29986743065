"""Continue the line through the outputs of the last two computed steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bwcache_compile.policies.definitions import Reuse, SmallSlot

if TYPE_CHECKING:
    from torch import Tensor


def keep(output: Tensor, kept_output: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the output, and the one before it."""
    return output, kept_output


def _moment(time: Tensor, step: Tensor) -> Tensor:
    """Return float32[2]: the time and the index of a step."""
    import torch

    return torch.cat([time, step.to(torch.float32)])


def push_time(time: Tensor, step: Tensor, kept_times: Tensor) -> Tensor:
    """Keep the times and the indices of the last two computed steps, the last one first."""
    import torch

    return torch.cat([_moment(time, step).reshape(1, 2), kept_times[:1]])


def extrapolate(kept_output: Tensor, kept_previous: Tensor, kept_times: Tensor, time: Tensor, step: Tensor) -> Tensor:
    """Continue the line through the last two computed outputs, in float32; hold until there are two.

    The line runs along the time. Where the time does not move from one computed step to the next (an input that looks
    like the time and is a frame rate), or is not finite, it runs along the step index.

    Args:
        kept_output: Output at the last computed step.
        kept_previous: Output at the computed step before it.
        kept_times: float32[2, 2], time and index of these steps, in that order; NaN where there is none.
        time: float32[1], the time of this step, in the same unit.
        step: int64[1], the index of this step.

    Returns:
        Tensor like `kept_output`.
    """
    import torch

    weights = (_moment(time, step) - kept_times[0]) / (kept_times[0] - kept_times[1])
    weight = torch.where(torch.isfinite(weights[0]), weights[0], weights[1])
    weight = torch.where(torch.isfinite(weight), weight, torch.zeros_like(weight))
    line = kept_output.float() + weight * (kept_output.float() - kept_previous.float())
    # before the second anchor the previous output is zeros, and 0 * x holds exactly
    return line.to(kept_output.dtype)


TAYLOR = Reuse(
    keep=keep,
    reuse=extrapolate,
    slots=("output", "previous"),
    shared=(SmallSlot("times", "float32", (2, 2), fill=math.nan),),
    keep_shared=push_time,
)
