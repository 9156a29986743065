"""How the frontier benchmark runs every way: the same noise and conditions, tuned alike, compared in pairs.

Tuning: each of a way's settings is tried on the first tuning seed; the best `KEPT` by PSNR, among those that compute no more
than the point's steps, are run on all tuning seeds, and the best mean wins. A threshold is solved by bisection for the
number of computed steps, on the first seed and again, in a narrow range, on all of them. No test seed is looked at.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import model as tiny
import numpy as np
import quality
import torch
from torch import Tensor

from benchmarks.frontier_score import attribute_agreement, blend, nearest_drawing, paired_interval
from benchmarks.frontier_ways import SLACK, Case, FewerSteps, Point, Running, Settings, Way

KEPT = 3
GROUP = 4
"""Seeds in one batch of a way that does not decide by what it measures."""
METRICS = ("psnr", "ssim", "truth", "attributes")
Row = dict[str, float]


class Store:
    """What was measured already, by a key that says all that it depends on; kept in a file of JSON lines if there is one."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._rows: dict[str, Row] = {}
        if path and path.exists():
            for line in path.read_text().splitlines():
                key, row = json.loads(line)
                self._rows[key] = row

    def get(self, key: str) -> Row | None:
        """Return what is known."""
        return self._rows.get(key)

    def put(self, key: str, row: Row) -> None:
        """Add a measurement."""
        self._rows[key] = row
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps([key, row]) + "\n")


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The settings that won, what they measured on the tuning seeds (nothing where there was no choice), and how many were tried."""

    settings: Settings
    psnr: float | None
    computed: float | None
    tried: int


def generate(running: Running, cases: Sequence[Case], solver: tiny.Solver) -> tuple[Tensor, float]:
    """Generate the clips of some cases in one batch; return them and the computed steps."""
    running.reset()
    tokens, noise = (torch.cat([getattr(case, name) for case in cases]) for name in ("tokens", "noise"))
    return tiny.sample(running.model, tokens, noise, running.steps, solver=solver), running.computed()


def mean(rows: Sequence[Row], name: str) -> float:
    """Return the mean of one column, without the last digits of its sum."""
    return round(float(np.mean([row[name] for row in rows])), 6)


class Protocol:
    """Runs ways with one solver.

    Args:
        solver: The solver of `tiny.sample`.
        clips: Clips per seed.
        tuning: Seeds for settings.
        testing: Seeds for figures.
        store: What is known from earlier runs.
    """

    def __init__(self, solver: tiny.Solver, clips: int, tuning: Sequence[int], testing: Sequence[int], store: Store) -> None:
        self.solver, self.clips, self.store = solver, clips, store
        self.tuning, self.testing = list(tuning), list(testing)
        self._cases = {seed: Case.of(seed, clips) for seed in {*tuning, *testing}}
        self._full: dict[tuple[int, int], Tensor] = {}
        self._fewer = FewerSteps()

    def _groups(self, seeds: Sequence[int], alone: bool) -> Iterator[list[int]]:
        size = 1 if alone else GROUP
        yield from (list(seeds[at : at + size]) for at in range(0, len(seeds), size))

    def _clips_of(self, running: Running, seeds: Sequence[int], alone: bool) -> Iterator[tuple[int, Tensor, float]]:
        """Generate, and yield each seed with its clips and computed steps."""
        for group in self._groups(seeds, alone):
            clips, computed = generate(running, [self._cases[seed] for seed in group], self.solver)
            for seed, part in zip(group, clips.split(self.clips), strict=True):
                yield seed, part, computed

    def full(self, seeds: Sequence[int], steps: int) -> list[Tensor]:
        """Return the clips of full runs."""
        if missing := [seed for seed in seeds if (seed, steps) not in self._full]:
            for seed, clips, _ in self._clips_of(self._fewer.start({"steps": steps}, steps, self.solver), missing, False):
                self._full[seed, steps] = clips
        return [self._full[seed, steps] for seed in seeds]

    def evaluate(self, way: Way, settings: Settings, steps: int, seeds: Sequence[int], scored: bool = False) -> list[Row]:
        """Run a way on seeds that have not been run yet, and return one row per seed.

        Args:
            way: The way.
            settings: Its settings.
            steps: Steps of the full run.
            seeds: Seeds.
            scored: Whether the rows also hold the scores against what was requested.
        """
        said = json.dumps([self.solver, self.clips, steps, way.name, settings, scored], sort_keys=True)
        keys = {seed: f"{said} {seed}" for seed in seeds}
        if missing := [seed for seed in seeds if self.store.get(keys[seed]) is None]:
            full = dict(zip(missing, self.full(missing, steps), strict=True))
            if isinstance(way, FewerSteps) and settings["steps"] == steps:
                results = [(seed, full[seed], float(steps)) for seed in missing]
            else:
                results = list(self._clips_of(way.start(settings, steps, self.solver), missing, way.alone))
            scores = self._scores([(seed, clips) for seed, clips, _ in results]) if scored else {}
            for seed, clips, computed in results:
                near = dataclasses.asdict(quality.closeness(clips, full[seed]))
                self.store.put(keys[seed], {"seed": seed, "computed": computed, **near, **scores.get(seed, {})})
        return [self.store.get(key) for key in keys.values()]

    def _scores(self, results: list[tuple[int, Tensor]]) -> dict[int, Row]:
        """Compare clips with what was requested."""
        clips = torch.cat([part for _, part in results])
        attributes = torch.cat([self._cases[seed].attributes for seed, _ in results])
        drawings, scene = nearest_drawing(clips, attributes)
        right = np.reshape(attribute_agreement(clips, attributes, scene), (-1, self.clips)).mean(1)
        pairs = zip(clips.split(self.clips), drawings.split(self.clips), strict=True)
        truths = [quality.closeness(ours, drawn).psnr for ours, drawn in pairs]
        return {seed: {"truth": truth, "attributes": float(share)} for (seed, _), truth, share in zip(results, truths, right, strict=True)}

    def _solved(self, way: Way, settings: Settings, point: Point, seeds: Sequence[int], near: Settings | None = None) -> Settings | None:
        """Return settings with the least knob that stays within the point's computed steps, by bisection; None where none does."""
        if way.knob is None:
            return settings
        name, low, high = way.knob
        rounds = 7
        if near:
            low, high, rounds = near[name] / 1.5, near[name] * 1.5, 5

        def computed(value: float) -> float:
            return mean(self.evaluate(way, {**settings, name: value}, point.steps, seeds), "computed")

        best = None
        for _ in range(rounds):
            value = round(math.sqrt(low * high), 5)
            count = computed(value)
            if count <= point.computed + SLACK:
                best = high = value
                if count > point.computed - SLACK:
                    break
            else:
                low = value
        if best is None:
            return self._solved(way, settings, point, seeds) if near else None
        return {**settings, name: best}

    def tune(self, way: Way, point: Point) -> Tuned | None:
        """Choose a way's settings for a point on the tuning seeds; None where it cannot compute so few steps."""
        grid = way.settings(point, self.solver)
        if len(grid) == 1 and way.knob is None:
            return Tuned(grid[0], None, None, 1)
        first, tried = self.tuning[:1], []
        for settings in grid:
            solved = self._solved(way, settings, point, first)
            if solved is not None:
                rows = self.evaluate(way, solved, point.steps, first)
                tried.append((mean(rows, "psnr"), mean(rows, "computed"), settings, solved))
        fitting = sorted((t for t in tried if t[1] <= point.computed + 1), key=lambda t: -t[0])[:KEPT]
        finals = []
        for _, _, settings, solved in fitting:
            again = self._solved(way, settings, point, self.tuning, near=solved if way.knob else None)
            if again is not None:
                rows = self.evaluate(way, again, point.steps, self.tuning)
                if mean(rows, "computed") <= point.computed + SLACK:
                    finals.append(Tuned(again, mean(rows, "psnr"), mean(rows, "computed"), len(grid)))
        return max(finals, key=lambda tuned: tuned.psnr or 0.0, default=None)

    def fewer(self, rows: Sequence[Row], steps: int) -> list[Row]:
        """Return, for each row's seed, the plain run with as many steps as the row computed, a fraction between two runs."""
        shares = {row["seed"]: blend(min(row["computed"], steps)) for row in rows}
        known: dict[tuple[float, int], Row] = {}
        for number in sorted({number for parts in shares.values() for number, _ in parts}):
            seeds = [seed for seed, parts in shares.items() if number in dict(parts)]
            for row in self.evaluate(self._fewer, {"steps": number}, steps, seeds, scored=True):
                known[row["seed"], number] = row
        return [{name: sum(share * known[seed, n][name] for n, share in parts) for name in METRICS} for seed, parts in shares.items()]

    def measure(self, way: Way, point: Point) -> dict[str, Any] | None:
        """Tune a way for a point, and run it on the test seeds next to fewer steps; None where it cannot compute so few."""
        tuned = self.tune(way, point)
        if tuned is None:
            return None
        rows = self.evaluate(way, tuned.settings, point.steps, self.testing, scored=True)
        fewer = self.fewer(rows, point.steps)
        counts = [row["computed"] for row in rows]
        against = {name: dataclasses.asdict(paired_interval([row[name] for row in rows], [row[name] for row in fewer])) for name in METRICS}
        return {
            "solver": self.solver, "way": way.name, "point": str(point), "asked": point.computed, "steps": point.steps,
            "settings": tuned.settings, "tried": tuned.tried, "tuning_psnr": tuned.psnr, "tuning_computed": tuned.computed,
            "computed": float(np.mean(counts)), "computed_range": [min(counts), max(counts)],
            **{name: mean(rows, name) for name in METRICS}, "against_fewer_steps": against,
        }  # fmt: skip

    def full_scores(self, steps: int) -> Row:
        """Return the scores of full runs against what was requested, and of noise."""
        rows = self.evaluate(self._fewer, {"steps": steps}, steps, self.testing, scored=True)
        noise = self._scores([(seed, self._cases[seed].noise.clamp(-1, 1)) for seed in self.testing]).values()
        return {
            **{name: mean(rows, name) for name in ("truth", "attributes")},
            **{f"noise_{name}": mean(list(noise), name) for name in ("truth", "attributes")},
        }
