"""Two ways of the frontier benchmark that decide on recorded outputs alone, as the methods do that they are called after.

Both see the outputs of full runs of the tuning seeds and never run what they choose: errors that a reused step feeds back into
the latents are not in what they minimize. L2P-style: the weights of the last computed outputs are a least-squares fit on a
comb. DPCache-style: the computed steps are the cheapest path through the recorded errors of reusing, by dynamic programming.
Both reuse at the model's output, on this package's graphs, whose report counts the computed steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import model as tiny
import numpy as np
import torch
from numpy.typing import NDArray

import bwcache_compile as bw
from benchmarks.frontier_ways import MOST_SETTINGS, Case, Point, Running, Settings, Way, combs, running_cached, taylor_schedule

ANCHORS = 4
Floats = NDArray[np.float64]


class Recorded:
    """What full runs of the tuning cases computed: the time of each step, and the scalar products of the outputs of all pairs of steps."""

    def __init__(self, tuning: list[Case]) -> None:
        """Record when first asked."""
        self._tuning = tuning
        self.of = functools.cache(self._record)

    def _record(self, steps: int, solver: tiny.Solver) -> tuple[Floats, Floats]:
        """Return the times, and the Gram matrix summed over cases and contexts."""
        gram, times = np.zeros((steps, steps)), np.zeros(steps)
        for case in self._tuning:
            model, outputs, seen = tiny.load(), [], []

            def keep(_: Any, args: tuple[Any, ...], returned: Any, outputs: list[Any] = outputs, seen: list[float] = seen) -> None:
                outputs.append(returned[0].double().flatten())
                seen.append(float(args[1][0]))

            model.register_forward_hook(keep)
            tiny.sample(model, case.tokens, case.noise, steps, solver=solver)
            for context in (0, 1):
                rows = torch.stack(outputs[context::2])
                gram += (rows @ rows.T).numpy()
            times = np.array(seen[::2])
        return times, gram


def anchors_of(mask: tuple[int, ...], step: int) -> list[int]:
    """Return the computed steps that a reused step may combine, the last one first."""
    return [other for other in range(step - 1, -1, -1) if not mask[other]][:ANCHORS]


def fitted_weights(gram: Floats, mask: tuple[int, ...], ridge: float) -> list[tuple[float, ...] | None]:
    """Fit each reused step's weights, which sum to 1, to the recorded outputs; `ridge` is relative to the anchors' mean square."""
    rows: list[tuple[float, ...] | None] = []
    for step, reused in enumerate(mask):
        anchors = anchors_of(mask, step)
        if not reused:
            rows.append(None)
            continue
        normal = gram[np.ix_(anchors, anchors)]
        scale = np.trace(normal) / len(anchors)
        system = np.ones((len(anchors) + 1, len(anchors) + 1))  # with a Lagrange multiplier for the sum
        system[:-1, :-1], system[-1, -1] = normal / scale + ridge * np.eye(len(anchors)), 0.0
        found = np.linalg.lstsq(system, np.append(gram[anchors, step] / scale, 1.0), rcond=None)[0][:-1].tolist()
        rows.append((*found, *(0.0 for _ in range(ANCHORS - len(anchors)))))
    return rows


def reuse_errors(gram: Floats, times: Floats, last: int, before: int | None, order: int) -> Floats:
    """Return the squared error of every later step if it reuses two computed ones: held, or continued along the time."""
    steps = len(gram)
    later = np.arange(last + 1, steps)
    ratio = np.zeros(len(later))
    if order and before is not None:
        ratio = (times[later] - times[last]) / (times[last] - times[before])
    other = last if before is None else before
    errors = np.full(steps, np.nan)
    errors[later] = (
        gram[later, later]
        + (1 + ratio) ** 2 * gram[last, last]
        + ratio**2 * gram[other, other]
        - 2 * (1 + ratio) * gram[later, last]
        + 2 * ratio * gram[later, other]
        - 2 * ratio * (1 + ratio) * gram[last, other]
    )
    return errors


def cheapest_mask(gram: Floats, times: Floats, computed: int, order: int) -> tuple[int, ...]:
    """Return the mask (1 reuses) with the least sum of recorded errors among those that compute so many steps, the first among them."""
    steps = len(gram)
    paths: dict[tuple[int, int | None], tuple[float, tuple[int, ...]]] = {(0, None): (0.0, (0,))}
    for _ in range(computed - 1):
        following: dict[tuple[int, int | None], tuple[float, tuple[int, ...]]] = {}
        for (last, before), (cost, path) in paths.items():
            summed = np.nancumsum(reuse_errors(gram, times, last, before, order))
            for step in range(last + 1, steps):
                total = cost + float(summed[step - 1] - summed[last])
                if (step, last) not in following or total < following[step, last][0]:
                    following[step, last] = total, (*path, step)
        paths = following
    ends = [
        (cost + float(np.nansum(reuse_errors(gram, times, last, before, order))), path) for (last, before), (cost, path) in paths.items()
    ]
    chosen = min(ends)[1]
    return tuple(int(step not in chosen) for step in range(steps))


class OpenLoop(Way):
    """Runs settings that were found on recorded outputs."""

    def __init__(self, recorded: Recorded) -> None:
        """Share the recordings."""
        self._recorded = recorded
        self._cached = functools.cache(lambda: bw.transform(tiny.load(), bw.CacheConfig(cut="output")))

    def config(self, settings: Settings, steps: int, solver: tiny.Solver) -> bw.CacheConfig:
        """Return the settings of the graphs."""
        raise NotImplementedError

    def start(self, settings: Settings, steps: int, solver: tiny.Solver) -> Running:
        """Run them."""
        cached = self._cached()
        cached.configure(self.config(settings, steps, solver))
        return running_cached(cached, steps)


class FittedOnRecordings(OpenLoop):
    """Weights from a least-squares fit on recorded outputs, on a comb."""

    name = "L2P-style weights"

    def settings(self, point: Point, solver: tiny.Solver) -> list[Settings]:
        """Try combs, with and without a penalty on large weights."""
        ridges = (0.0, 1e-4, 1e-2)
        return [{**comb, "ridge": ridge} for comb in combs(point, MOST_SETTINGS // len(ridges)) for ridge in ridges]

    def config(self, settings: Settings, steps: int, solver: tiny.Solver) -> bw.CacheConfig:
        """Fit the weights on the comb."""
        before, interval, after = (settings[name] for name in ("disable_cache_before_step", "cache_interval", "disable_cache_after_step"))
        end = steps if after is None else after
        mask = tuple(int(not (step < before or (step - before - 1) % interval == 0 or step >= end)) for step in range(steps))
        assert mask.count(0) == taylor_schedule(before, interval, after, steps)
        _, gram = self._recorded.of(steps, solver)
        weights = fitted_weights(gram, mask, settings["ridge"])
        return bw.CacheConfig(policy="static", steps_mask=mask, reuse="linear", anchors=ANCHORS, weights=weights, cut="output")


class CheapestPath(OpenLoop):
    """The mask with the least sum of recorded errors, for a rule of reuse."""

    name = "DPCache-style masks"

    def settings(self, point: Point, solver: tiny.Solver) -> list[Settings]:
        """Try both rules."""
        return [{"computed": point.computed, "order": order} for order in (0, 1)]

    def config(self, settings: Settings, steps: int, solver: tiny.Solver) -> bw.CacheConfig:
        """Search the mask."""
        times, gram = self._recorded.of(steps, solver)
        mask = cheapest_mask(gram, times, settings["computed"], settings["order"])
        return bw.CacheConfig(policy="static", steps_mask=mask, reuse="taylor" if settings["order"] else "output", cut="output")


def open_loop(tuning: list[Case]) -> list[Way]:
    """Return both."""
    recorded = Recorded(tuning)
    ways: list[Callable[[Recorded], Way]] = [FittedOnRecordings, CheapestPath]
    return [way(recorded) for way in ways]
