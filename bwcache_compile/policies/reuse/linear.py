"""Return a weighted sum of what the blocks returned at the last computed steps, the anchors."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bwcache_compile.policies.definitions import Parameter, Reuse, SmallSlot, Values

if TYPE_CHECKING:
    from torch import Tensor

    from bwcache_compile.config import CacheConfig

MOST_ANCHORS = 8
_NO_ROW = -2.0
"""Stands for the anchors of a step that has no row of weights: no anchor was computed there."""


def _slots(anchors: int) -> tuple[str, ...]:
    """Name the slots of the anchors, the last computed step first."""
    return ("output", "previous", *(f"previous_{k}" for k in range(2, anchors)))[:anchors]


def _taking(function: Callable[..., Any], *names: str) -> Callable[..., Any]:
    """Give a function of any number of tensors the parameters that passes look up by name."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    function.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
    return function


def _moment(time: Tensor, step: Tensor) -> Tensor:
    """Return float32[2]: the time and the index of a step."""
    import torch

    return torch.cat([time, step.to(torch.float32)])


def push_time(time: Tensor, step: Tensor, kept_times: Tensor) -> Tensor:
    """Keep the times and the indices of the anchors, float32[anchors, 2], the last computed step first."""
    import torch

    return torch.cat([_moment(time, step).reshape(1, 2), kept_times[:-1]])


def _through(now: Tensor, times: Tensor, orders: Tensor) -> Tensor:
    """Weigh anchors so that the polynomial through the first `order + 1` of them is continued, for each of some orders.

    Args:
        now: float32[2], time and index of this step.
        times: float32[anchors, 2], the same of the anchors.
        orders: int64[orders].

    Returns:
        float32[orders, anchors, 2], Lagrange's weights along the time and along the index.
    """
    import torch

    places = torch.arange(times.shape[0], device=times.device)
    unused = places > orders.reshape(-1, 1)
    left_out = unused.unsqueeze(1) | (places == places.reshape(-1, 1))
    ratios = (now - times) / (times.unsqueeze(1) - times)
    factors = torch.where(left_out.unsqueeze(3), 1.0, ratios)
    return torch.where(unused.unsqueeze(2), 0.0, factors.prod(2))


def rule_weights(now: Tensor, kept_times: Tensor, order: Tensor, damping: Tensor) -> Tensor:
    """Weigh the anchors by a rule: from the polynomial of order `order - 1`, `damping` of the way to the one of order `order`.

    Order 0 holds the last anchor, order 1 continues the line through two. The order is at most what the anchors that there are allow.
    Polynomials run along the time. Where the time does not move from one anchor to the next (an input that looks like the time and
    is a frame rate), or is not finite, they run along the step index.

    Args:
        now: float32[2], time and index of this step.
        kept_times: float32[anchors, 2], the same of the anchors; NaN where there is none.
        order: int64[1].
        damping: float32[1].

    Returns:
        float32[anchors], of sum 1.
    """
    import torch

    index = kept_times[:, 1]
    highest = torch.minimum(order, (index == index).sum() - 1)  # NaN is not equal to itself
    both = _through(now, kept_times, torch.cat([highest, (highest - 1).clamp(min=0)]))
    weights = damping * both[0] + (1 - damping) * both[1]
    along_time, along_index = weights[:, 0], weights[:, 1]
    return torch.where((along_time - along_time == 0).all(), along_time, along_index)  # false where one is infinite or NaN


def anchor_weights(
    time: Tensor, step: Tensor, kept_times: Tensor, weights: Tensor, anchor_steps: Tensor, order: Tensor, damping: Tensor
) -> Tensor:
    """Weigh the anchors by this step's row of a table, or by the rule where the table has none for these anchors.

    Args:
        time: float32[1], the time of this step.
        step: int64[1], the index of this step.
        kept_times: float32[anchors, 2], time and index of the anchors; NaN where there is none.
        weights: float32[rows, anchors].
        anchor_steps: float32[rows, anchors], the steps that a row's weights were made for; -1 where there is none.
        order: int64[1], of the rule.
        damping: float32[1], of the rule.

    Returns:
        float32[anchors], of sum 1.
    """
    import torch

    row = step.clamp(max=weights.shape[0] - 1)
    applies = (anchor_steps[row] == torch.nan_to_num(kept_times[:, 1], nan=-1.0)).all()
    return torch.where(applies, weights[row].reshape(-1), rule_weights(_moment(time, step), kept_times, order, damping))


def weighted_sum(anchors: tuple[Tensor, ...], weights: Tensor) -> Tensor:
    """Sum the anchors in float32. The first one's weight is what the others leave of 1, so what all agree on comes out as it is."""
    first = anchors[0].float()
    total = first
    for k, anchor in enumerate(anchors[1:], start=1):
        # of an anchor that there is not, zeros, the weight is 0
        total = total + weights[k] * (anchor.float() - first)
    return total.to(anchors[0].dtype)


def _anchor_steps(computed: list[int], anchors: int, step: int) -> tuple[float, ...]:
    """Return the last computed steps before a step, the latest first."""
    before = [float(s) for s in computed if s < step][::-1][:anchors]
    return (*before, *[-1.0] * (anchors - len(before)))


def _values(config: CacheConfig) -> dict[str, Values]:
    anchors, mask = config.graph_settings.anchors, config.steps_mask or (0,)
    rows = config.weights or (None,) * len(mask)
    steps = range(len(mask))
    times = config.timesteps or (0.0,) * len(mask)
    computed = [step for step in steps if not mask[step] and times[step] is not None]  # at the others another model runs
    return {
        "weights": tuple(row or (1.0, *[0.0] * (anchors - 1)) for row in rows),
        "anchor_steps": tuple(_anchor_steps(computed, anchors, s) if rows[s] else (_NO_ROW,) * anchors for s in steps),
        "order": (config.order,),
        "damping": (float(config.damping),),
    }


def noise_gain(config: CacheConfig) -> float:
    """Return what reused steps multiply the noise of the anchors by at most: the largest Euclidean norm of a row of weights.

    The rule is counted where it goes least far, one step beyond anchors that follow one another.
    """
    anchors, mask = config.graph_settings.anchors, config.steps_mask or ()
    if anchors == 1:
        return 1.0
    reused = [row for row, reuse in zip(config.weights or (None,) * len(mask), mask, strict=True) if reuse]
    rows = [row for row in reused if row is not None]
    if len(rows) < len(reused) or not mask:
        order = min(config.order, anchors - 1)
        both = [[(-1) ** k * math.comb(m + 1, k + 1) for k in range(anchors)] for m in (order, max(order - 1, 0))]
        rows.append(tuple(config.damping * a + (1 - config.damping) * b for a, b in zip(*both, strict=True)))
    return max((math.hypot(*row) for row in rows), default=1.0)


@functools.cache
def linear(anchors: int, residual: bool = False) -> Reuse:
    """Return the way of reusing that sums `anchors` anchors.

    Args:
        anchors: How many computed steps are kept.
        residual: Keep what the blocks added to their input instead of their outputs, and add the sum to the input of this step.
    """
    slots = _slots(anchors)
    kept = tuple(f"kept_{slot}" for slot in slots)
    source = ("source",) if residual else ()

    def keep(output: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        value, earlier = (output - others[0], others[1:]) if residual else (output, others)
        return (value, *earlier)

    def reuse(*given: Tensor) -> Tensor:
        entered, values, moment = given[: len(source)], given[len(source) :][:anchors], given[len(source) + anchors :]
        reused = weighted_sum(values, anchor_weights(*moment)) if anchors > 1 else values[0]
        return entered[0] + reused if residual else reused

    moment = ("time", "step", "kept_times", "weights", "anchor_steps", "order", "damping")
    return Reuse(
        keep=_taking(keep, "output", *source, *kept[:-1]),
        reuse=_taking(reuse, *source, *kept, *(moment if anchors > 1 else ())),
        slots=slots,
        shared=(SmallSlot("times", "float32", (anchors, 2), fill=math.nan),) if anchors > 1 else (),
        keep_shared=push_time if anchors > 1 else None,
        parameters=(
            Parameter("weights", "float32", per_step=True, columns=anchors),
            Parameter("anchor_steps", "float32", per_step=True, columns=anchors),
            Parameter("order"),
            Parameter("damping", "float32"),
        )
        if anchors > 1
        else (),
        values=_values if anchors > 1 else None,
        any_dtype=anchors == 1 and not residual,
        anchors=anchors,
        with_anchors=functools.partial(linear, residual=residual),
    )
