"""Scores of the frontier benchmark: agreement with what was requested, and intervals of paired differences.

The data of the bundled model are drawn, so a clip can be judged without a reference run: how near is it to *some* clip
that `data.py` could have drawn for the requested attributes? `nearest_drawing` finds that clip. Place within its ninth,
speeds and backdrop are free within the ranges of the data; kinds, colors, textures, sizes, ninths, headings and order are not.
Two scores follow: `truth`, the PSNR of the generated clip against that drawing, and `attributes`, the share of the requested
attributes that no other value of the same attribute explains better, the rest of the drawing unchanged.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import data
import numpy as np
import torch
from scipy import stats
from torch import Tensor

STARTS, SPEEDS = 12, 8
"""Starts and speeds tried along each axis before the refinement."""
REACH = 8
"""Pixels from a shape's center to the edge of its template."""
HIDDEN = 0.15
"""Most that one frame may cost a path: a shape may be hidden behind another."""
REFINEMENTS = 40


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return mean and bounds with a sign."""
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def paired_interval(ours: Sequence[float], theirs: Sequence[float], level: float = 0.95) -> Interval:
    """Return the mean of `ours - theirs` over the pairs with Student's interval; a single pair has no bounds."""
    differences = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    mean, count = float(differences.mean()), len(differences)
    if count < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(stats.t.ppf((1 + level) / 2, count - 1) * differences.std(ddof=1) / math.sqrt(count))
    return Interval(mean, mean - half, mean + half)


def _path_costs(clips: Tensor, attributes: Tensor) -> Tensor:
    """Return the mean squared difference of each shape from the clip at each center: float32[B, OBJECTS, F, H, W]."""
    batch, objects, frames, size = len(clips), data.OBJECTS, data.FRAMES, data.SIZE
    offset = torch.arange(-REACH, REACH + 1).float()
    across = offset.expand(batch, objects, 1, len(offset), -1)
    coverage, paint = data.paint(attributes, across, across.transpose(-2, -1))
    coverage, paint = coverage[:, :, 0], paint[:, :, 0]
    picture = (clips + 1) / 2
    channels = torch.cat([picture.square().sum(1, keepdim=True), picture], 1).transpose(1, 2)  # [B, F, 4, H, W]
    grouped = channels.repeat_interleave(objects, 0).transpose(0, 1).reshape(frames, batch * objects * 4, size, size)
    kernel = torch.cat([coverage[:, :, None], -2 * coverage[:, :, None] * paint], 2).flatten(0, 1)
    cost = torch.nn.functional.conv2d(grouped, kernel, padding=REACH, groups=batch * objects)
    constant = (coverage * paint.square().sum(2)).sum((-2, -1)).flatten()
    cost = (cost + constant[:, None, None]) / coverage.sum((-2, -1)).flatten()[:, None, None] / 3
    return cost.unflatten(1, (batch, objects)).movedim(0, 2)


def _first_guess(clips: Tensor, attributes: Tensor) -> data.Scene:
    """Choose each shape's path on a grid of starts and speeds, on its own."""
    batch, objects = attributes.shape[:2]
    cost = _path_costs(clips, attributes).clamp(max=HIDDEN)
    start = (torch.arange(STARTS) + 0.5) / STARTS
    speed = torch.linspace(*data.SPEEDS, SPEEDS)
    pairs = torch.cartesian_prod(start, speed)
    every = torch.arange(batch * objects).view(-1, 1, 1, 1)
    frame = torch.arange(data.FRAMES)
    columns, rows = [], []
    for one_start, one_speed in pairs:
        scene = data.Scene(one_start.expand(batch, objects, 2), one_speed.expand(batch, objects, 2), torch.zeros(batch, 3))
        x, y = data.centers(attributes, scene)
        columns.append(x.long().flatten(0, 1))
        rows.append(y.long().flatten(0, 1))
    x, y = torch.stack(columns, 1)[:, None], torch.stack(rows, 1)[:, :, None]  # [BO, 1, pairs, F] and [BO, pairs, 1, F]
    total = cost.flatten(0, 1)[every, frame, y, x].sum(-1)
    best = total.flatten(1).argmin(1)
    chosen = torch.stack([pairs[best % len(pairs)], pairs[best // len(pairs)]], 1).view(batch, objects, 2, 2)
    return data.Scene(chosen[..., 0], chosen[..., 1], torch.full((batch, 3), data.STEEPEST / 2))


def nearest_drawing(clips: Tensor, attributes: Tensor) -> tuple[Tensor, data.Scene]:
    """Find the clips nearest to `clips` among those that `data.py` could have drawn for `attributes`.

    A search over each shape's path on a grid, then gradient descent on all of a clip's freedoms together.

    Args:
        clips: float32[B, 3, F, H, W] in [-1, 1].
        attributes: What was requested, int64[B, OBJECTS, 6].

    Returns:
        The drawings, float32[B, 3, F, H, W], and what the attributes leave open in them.
    """
    guess = _first_guess(clips, attributes)
    values = [value.clone().requires_grad_() for value in (guess.start, guess.speed, guess.slope)]
    ranges = [(0.0, 1.0), data.SPEEDS, (0.0, data.STEEPEST)]
    optimizer = torch.optim.Adam(values, lr=0.03)
    best = torch.full((len(clips),), math.inf)
    found = [value.detach().clone() for value in values]
    with torch.enable_grad():
        for refinement in range(REFINEMENTS):
            optimizer.param_groups[0]["lr"] = 0.03 * (1 - refinement / REFINEMENTS)
            drawn = data.draw(attributes, data.Scene(*values))
            loss = (drawn - clips).square().mean((1, 2, 3, 4))
            better = loss.detach() < best
            best = torch.where(better, loss.detach(), best)
            for kept, value in zip(found, values, strict=True):
                kept[better] = value.detach()[better]
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            with torch.no_grad():
                for value, (low, high) in zip(values, ranges, strict=True):
                    value.clamp_(low, high)
    scene = data.Scene(*found)
    return data.draw(attributes, scene), scene


def attribute_agreement(clips: Tensor, attributes: Tensor, scene: data.Scene) -> list[float]:
    """Return each clip's share of attributes that explain it best.

    Args:
        clips: float32[B, 3, F, H, W].
        attributes: What was requested, int64[B, OBJECTS, 6].
        scene: Where the shapes are, from `nearest_drawing`.
    """

    def errors(requested: Tensor) -> Tensor:
        return (data.draw(requested, scene) - clips).square().mean((1, 2, 3, 4))

    asked = errors(attributes) + 1e-9
    right = torch.zeros(len(clips))
    for shape in range(data.OBJECTS):
        for column, names in enumerate(data.ATTRIBUTES):
            best = torch.ones(len(clips), dtype=torch.bool)
            for shift in range(1, len(names)):
                other = attributes.clone()
                other[:, shape, column] = (other[:, shape, column] + shift) % len(names)
                best &= asked <= errors(other)
            right += best
    return (right / (data.OBJECTS * len(data.ATTRIBUTES))).tolist()


def blend(computed: float) -> list[tuple[int, float]]:
    """Return the whole numbers of steps around `computed` with their weights: a fraction lies between two plain runs."""
    low = math.floor(computed)
    share = computed - low
    return [(steps, weight) for steps, weight in ((low, 1 - share), (low + 1, share)) if weight > 1e-9]


def draw_frontier(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Plot PSNR over computed steps, one line per way."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    names = list(dict.fromkeys(row["way"] for row in rows))
    for index, name in enumerate(names):
        points = sorted((row["computed"], row["psnr"]) for row in rows if row["way"] == name)
        style = {"color": "k", "linestyle": "--"} if name == "fewer steps" else {"color": f"C{index % 10}"}
        axis.plot(*zip(*points, strict=True), marker="osv^D"[index // 10 % 5], label=name, **style)
    axis.set(xlabel="computed steps", ylabel="PSNR against the full run (dB)", title=title)
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=130)
    plt.close(figure)
