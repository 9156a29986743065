"""Rules of reuse that need no fit: hold the last output, continue the line through two, or a damped parabola through three."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RULES: dict[str, tuple[int, float]] = {"hold": (0, 1.0), "linear": (1, 1.0), "damped": (2, 0.4)}
"""Order of the polynomial of each rule, and the share of its highest term."""


def lagrange(anchors: Sequence[int], step: int) -> list[float]:
    """Return the weights of the polynomial through the anchors at a step."""
    weights = []
    for i, anchor in enumerate(anchors):
        weight = 1.0
        for j, other in enumerate(anchors):
            if i != j:
                weight *= (step - other) / (anchor - other)
        weights.append(weight)
    return weights


def rule_weights(rule: str, anchors: Sequence[int], step: int, count: int) -> Tensor:
    """Return a rule's weights, zero-padded to `count`.

    Args:
        rule: A key of `RULES`.
        anchors: The last computed steps, newest first.
        step: The reused step.
        count: Anchors that a state keeps.
    """
    order, share = RULES[rule]
    order = min(order, len(anchors) - 1, count - 1)
    weights = torch.zeros(count, dtype=torch.float64)
    weights[: order + 1] = torch.tensor(lagrange(anchors[: order + 1], step), dtype=torch.float64)
    if share != 1.0 and order == RULES[rule][0]:
        lower = torch.zeros(count, dtype=torch.float64)
        lower[:order] = torch.tensor(lagrange(anchors[:order], step), dtype=torch.float64)
        weights = share * weights + (1 - share) * lower
    return weights


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
