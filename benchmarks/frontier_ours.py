"""The calibrated way of this package for the frontier benchmark."""

from __future__ import annotations

import functools

import model as tiny

import bwcache_compile as bw
from benchmarks.frontier_ways import Case, Point, Running, Settings, Way, running_cached


class Calibrated(Way):
    """A plan for the point's computed steps, calibrated on the first tuning case alone, with the settings of a first-time user."""

    name = "calibrated"

    def __init__(self, tuning: list[Case]) -> None:
        """Calibrate at the first start of each point."""
        self._tuning = tuning
        self._plan = functools.cache(self._calibrate)
        self._cached = functools.cache(lambda: bw.transform(tiny.load()))

    def _calibrate(self, computed: int, steps: int, solver: tiny.Solver) -> bw.CacheConfig:
        case, budget = self._tuning[0], computed / steps

        def generate(model: bw.CachedModel) -> object:
            return tiny.sample(model, case.tokens, case.noise, steps, solver=solver)

        return bw.calibrate(tiny.load(), generate, budgets=(budget,), progress=False).at(budget)

    def settings(self, point: Point, solver: tiny.Solver) -> list[Settings]:
        """Calibration tunes itself."""
        return [{"computed": point.computed}]

    def start(self, settings: Settings, steps: int, solver: tiny.Solver) -> Running:
        """Run the plan on the model's graphs."""
        cached = self._cached()
        cached.configure(self._plan(settings["computed"], steps, solver))
        return running_cached(cached, steps)
