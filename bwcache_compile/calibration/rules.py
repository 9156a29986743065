"""Rules of reuse that need no fit: hold the last output, continue the line through two, or a damped parabola through three."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bwcache_compile.policies.reuse import linear

RULES: dict[str, tuple[int, float]] = {"hold": (0, 1.0), "linear": (1, 1.0), "damped": (2, 0.4)}
"""Order and damping of each rule, as in `CacheConfig`."""


def rule_weights(rule: str, anchors: Sequence[int], step: int, count: int) -> Tensor:
    """Return a rule's weights along the step index, as the graphs find them, float64[count].

    Args:
        rule: A key of `RULES`.
        anchors: The last computed steps, newest first.
        step: The reused step.
        count: Anchors that a state keeps.
    """
    order, damping = RULES[rule]
    kept = torch.tensor([*anchors[:count], *[math.nan] * (count - len(anchors))], dtype=torch.float64)
    now = torch.tensor([step, step], dtype=torch.float64)
    return linear.rule_weights(now, kept.reshape(-1, 1).expand(-1, 2), torch.tensor([order]), torch.tensor([damping], dtype=torch.float64))


def rule_table(rule: str, mask: Sequence[bool], count: int) -> list[list[float]]:
    """Return a rule's weights at each reused step of a mask; zeros at computed ones."""
    anchors: list[int] = []
    table = []
    for step, computed in enumerate(mask):
        if computed:
            anchors = [step, *anchors][:count]
            table.append([0.0] * count)
        else:
            table.append(rule_weights(rule, anchors, step, count).tolist())
    return table
