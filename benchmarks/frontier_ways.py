"""What the frontier benchmark compares: the interface of a way of running, the plain run, and this package's fixed rules.

A way lists the settings that it may be tuned over for a number of computed steps, and starts a model with one of them.
Rivals are in `frontier_rivals.py` and `frontier_cache_dit.py`, calibration in `frontier_ours.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import data
import model as tiny
import numpy as np
import torch
from torch import Tensor, nn

import bwcache_compile as bw

Settings = dict[str, Any]
SLACK = 0.25
"""How far the tuned mean of computed steps may exceed the number asked for."""
MOST_SETTINGS = 18


@dataclasses.dataclass(frozen=True)
class Point:
    """A number of computed steps out of all steps of a generation."""

    computed: int
    steps: int = 50

    @classmethod
    def parse(cls, text: str) -> Point:
        """Read "14" (of 50) or "12/30"."""
        computed, _, steps = text.partition("/")
        return cls(int(computed), int(steps or 50))

    def __str__(self) -> str:
        """Return it as "14 of 50"."""
        return f"{self.computed} of {self.steps}"


@dataclasses.dataclass(frozen=True)
class Case:
    """What one seed generates: its condition and its noise."""

    seed: int
    attributes: Tensor
    tokens: Tensor
    noise: Tensor

    @classmethod
    def of(cls, seed: int, clips: int) -> Case:
        """Draw a case."""
        attributes = data.draw_attributes(clips, torch.Generator().manual_seed(seed))
        return cls(seed, attributes, data.encode(attributes), tiny.draw_noise(clips, seed))


class BlockWork:
    """Counts how much of the blocks' linear layers ran, as full steps of a generation with two contexts."""

    def __init__(self, model: nn.Module) -> None:
        layers = [layer for layer in model.blocks.modules() if isinstance(layer, nn.Linear)]
        self._all = 2 * sum(layer.weight.numel() for layer in layers)
        self._done = 0
        for layer in layers:
            layer.register_forward_hook(self._count)

    def _count(self, layer: nn.Linear, *_: Any) -> None:
        self._done += layer.weight.numel()

    def reset(self) -> None:
        """Begin a generation."""
        self._done = 0

    def computed(self) -> float:
        """Return the full steps' worth of blocks that ran since `reset`."""
        return self._done / self._all


@dataclasses.dataclass(frozen=True)
class Running:
    """A model that runs in some way.

    Attributes:
        model: Called as `tiny.sample` does.
        steps: Steps to sample.
        reset: Called before each generation.
        computed: Returns the computed steps of the last generation, counted where the blocks ran.
    """

    model: Any
    steps: int
    reset: Callable[[], None]
    computed: Callable[[], float]


def running_cached(cached: bw.CachedModel, steps: int) -> Running:
    """Run a cached model; its report counts the computed steps, as its graphs call no modules that a hook could watch."""

    def computed() -> float:
        contexts = cached.report().contexts.values()
        return sum(context.computed for context in contexts) / len(contexts)

    return Running(cached, steps, cached.reset, computed)


class Way:
    """A way of running the model with fewer computed steps.

    Attributes:
        name: As in the tables.
        alone: Whether it decides by what it measures; then each seed is generated on its own.
        knob: A setting to be solved for the number of computed steps, and its range; more of it computes less.
    """

    name: str
    alone: bool = False
    knob: ClassVar[tuple[str, float, float] | None] = None

    def settings(self, point: Point, solver: tiny.Solver) -> list[Settings]:
        """List the settings to try for a point, without the knob; settings that compute too much may be among them."""
        raise NotImplementedError

    def start(self, settings: Settings, steps: int, solver: tiny.Solver) -> Running:
        """Make a model that runs with these settings in generations of `steps` steps."""
        raise NotImplementedError


class FewerSteps(Way):
    """The plain model with fewer steps of the same solver."""

    name = "fewer steps"

    def settings(self, point: Point, solver: tiny.Solver) -> list[Settings]:
        """There is nothing to tune."""
        return [{"steps": point.computed}]

    def start(self, settings: Settings, steps: int, solver: tiny.Solver) -> Running:
        """Run the plain model."""
        model = tiny.load()
        work = BlockWork(model)
        return Running(model, settings["steps"], work.reset, work.computed)


def paper_schedule(trigger: int, interval: int, steps: int, tail: float = 0.5) -> int:
    """Return how many steps the paper's schedule computes, given the step that triggers; `trigger` is `steps` where none does."""
    end = steps - math.floor(tail * trigger)
    return steps - sum(step > trigger and step < end and (step - trigger) % (interval + 1) != 0 for step in range(steps))


class Indicators:
    """The indicator of every step of uncached runs of the tuning cases, the mean of both contexts."""

    def __init__(self, tuning: list[Case]) -> None:
        self._tuning = tuning
        self._curves: dict[tuple[int, str], list[list[float]]] = {}

    def curves(self, steps: int, solver: tiny.Solver) -> list[list[float]]:
        """Return one curve per case; the first value is that of step 1."""
        if (steps, solver) not in self._curves:
            probe = bw.transform(tiny.load(), bw.CacheConfig.paper(threshold=0, num_steps=steps))
            curves = self._curves[steps, solver] = []
            for case in self._tuning:
                probe.reset()
                tiny.sample(probe, case.tokens, case.noise, steps, solver=solver)
                contexts = [[r.indicator for r in c.steps if r.indicator is not None] for c in probe.report().contexts.values()]
                curves.append([sum(values) / len(values) for values in zip(*contexts, strict=True)])
        return self._curves[steps, solver]

    def threshold(self, point: Point, interval: int, solver: tiny.Solver) -> float | None:
        """Return the least threshold with which the paper's schedule computes no more than the point's steps on average."""
        curves = self.curves(point.steps, solver)
        for threshold in (*np.geomspace(0.005, 1, 300).round(5).tolist(), math.inf):
            triggers = [next((s for s, v in enumerate(curve, 1) if v < threshold), point.steps) for curve in curves]
            if np.mean([paper_schedule(k, interval, point.steps) for k in triggers]) <= point.computed + SLACK:
                return threshold
        return None


class PaperSchedule(Way):
    """The paper's schedule (every block and token measured) with one of this package's rules of reuse.

    Both contexts decide together: `results/quality.json` shows that deciding apart is worse at every threshold.
    """

    alone = True

    def __init__(self, reuse: str, indicators: Indicators) -> None:
        self.name = {"output": "paper"}.get(reuse, f"paper's schedule, {reuse}")
        self._reuse, self._indicators = reuse, indicators
        self._cached = functools.cache(self._transform)

    def _transform(self, steps: int) -> bw.CachedModel:
        return bw.transform(tiny.load(), bw.CacheConfig.paper(reuse=self._reuse, decide="joint", num_steps=steps))

    def settings(self, point: Point, solver: tiny.Solver) -> list[Settings]:
        """Try intervals, each with the threshold that computes the point's steps."""
        found = {interval: self._indicators.threshold(point, interval, solver) for interval in (1, 2, 3, 4, 5, 6, 8, 10)}
        return [{"threshold": value, "reuse_interval": interval} for interval, value in found.items() if value is not None]

    def start(self, settings: Settings, steps: int, solver: tiny.Solver) -> Running:
        """Run a cached model."""
        cached = self._cached(steps)
        cached.configure(**settings)
        return running_cached(cached, steps)


def combs(point: Point, most: int) -> list[Settings]:
    """List combs of computed steps as diffusers' TaylorSeer describes them, the most steps that stay within the point.

    Each starts with `disable_cache_before_step` computed steps, then computes one in `cache_interval`; some protect the end.
    """
    found = []
    for interval in range(2, 12):
        for after in (None, point.steps - 2, point.steps - 4):
            counts = {before: taylor_schedule(before, interval, after, point.steps) for before in range(1, point.steps)}
            fitting = [before for before, count in counts.items() if count <= point.computed]
            if fitting and counts[fitting[-1]] >= point.computed - 1:
                found.append({"cache_interval": interval, "disable_cache_before_step": fitting[-1], "disable_cache_after_step": after})
    return found[:most]


def taylor_schedule(before: int, interval: int, after: int | None, steps: int) -> int:
    """Return how many steps diffusers' TaylorSeer computes."""
    end = steps if after is None else after
    return sum(step < before or (step - before - 1) % interval == 0 or step >= end for step in range(steps))
