"""The result of a calibration: for each budget, which steps to compute and how to reuse the others."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from bwcache_compile.atomic_write import write_atomically
from bwcache_compile.calibration.masks import mask_text
from bwcache_compile.calibration.plan_entry import PlanEntry
from bwcache_compile.calibration.rules import RULES
from bwcache_compile.config import CacheConfig
from bwcache_compile.contexts import UNNAMED_PREFIX
from bwcache_compile.errors import ConfigError, warn

FORMAT = "bwcache-calibration"
VERSION = 3
LARGE_NORM = 8.0
"""Norm of the weights above which a plan warns. On the bundled model, fits at 10 to 20 of 50 steps stay at or below 7.3."""
MARGIN = 1.35
"""How far the indicator of a guarded plan may be beyond what calibration saw, as a factor.

On the bundled model under Euler it is at most 1.12 on other prompts, 1.4 with twice the guidance, where the weights still serve, and 2.7
with three times, where they do not.
"""
Value = TypeVar("Value")
_BUDGET_SLACK = 0.02


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What a plan was made for.

    Attributes:
        model: Its class, dtype and a fingerprint of its weights, see `model_identity`.
        timesteps: The time at each step of this model; empty where none was found.
        step_indices: Index of each of these steps among those of the generation, of which other models may run some.
        num_steps: Steps of the generation.
        contexts: Names of the streams of calls.
        calls: Step and context of each call of a generation.
        cut: Where the anchors are taken.
        anchor_bytes: What all anchors of all contexts take; 0 where it is not known.
        sampler: What was found out about the sampler.
        prompts: How many prompts were calibrated on.
        cost: What it took, in full generations.
        versions: Of the libraries.
    """

    model: str
    timesteps: tuple[float, ...]
    step_indices: tuple[int, ...]
    num_steps: int
    contexts: tuple[str, ...]
    calls: tuple[tuple[int, str], ...]
    cut: str
    anchor_bytes: int
    sampler: str
    prompts: int
    cost: float
    versions: dict[str, str]

    def placed(self, values: Sequence[Value], elsewhere: Value) -> list[Value]:
        """Return the values of this model's steps at their places among all steps, and `elsewhere` where another model runs."""
        own = dict(zip(self.step_indices, values, strict=True))
        return [own.get(step, elsewhere) for step in range(self.num_steps)]


@dataclasses.dataclass(frozen=True)
class CalibrationPlan:
    """For each budget, which steps to compute and how to reuse the others, and what the plan was made for.

    Attributes:
        entries: From the most computed steps to the fewest.
        provenance: What it was made for.
    """

    entries: tuple[PlanEntry, ...]
    provenance: Provenance

    @property
    def steps(self) -> int:
        """Steps of this model in a generation."""
        return len(self.entries[0].mask)

    @property
    def anchors(self) -> int:
        """Computed steps that a reused step combines."""
        return len(self.entries[0].weights[0])

    def __str__(self) -> str:
        """Lay the frontier out as a table."""
        made = self.provenance
        size = f" ({made.anchor_bytes / 2**20:.2f} MiB)" if made.anchor_bytes else ""
        steps = f"{self.steps} steps"
        if self.steps < made.num_steps:
            steps += f" ({made.step_indices[0]} to {made.step_indices[-1]} of {made.num_steps})"
        lines = [
            f"calibration of {made.model.partition(',')[0]} for {steps}, {self.anchors} anchors at the {made.cut}{size},"
            f" {made.prompts} prompt{'s' * (made.prompts > 1)}; {made.sampler}",
            f"{'computed':>9} {'speed-up':>9} {'PSNR':>9} {'fewer steps':>12}  weights  steps (# computed, . reused)",
        ]
        for entry in self.entries:
            fewer = "" if entry.fewer_steps_psnr is None else f"{entry.fewer_steps_psnr:.1f} dB"
            advice = f"  advice: run {entry.computed} plain steps instead" if entry.fewer_steps_wins else ""
            numbers = f"{entry.computed:9} {entry.speedup:8.2f}x {entry.psnr:6.1f} dB {fewer:>12}"
            lines.append(f"{numbers}  {entry.rule:7}  {mask_text(entry.mask)}{advice}")
        lines += [entry.verified for entry in self.entries if entry.unseen]
        for entry in self.entries:
            norm, step = entry.amplification
            if norm > LARGE_NORM:
                lines.append(
                    f"warning: with {entry.computed} computed steps the weights of step {step} have norm {norm:.1f}: they amplify noise in"
                    " the anchors, such as rounding to half precision, by that factor. Use fewer anchors, or compute more steps."
                )
        return "\n".join(lines)

    def at(
        self, budget: float | None = None, *, psnr: float | None = None, speedup: float | None = None, guarded: bool = False
    ) -> CacheConfig:
        """Return the settings for a target, for `cached.configure` or `transform`.

        A run at other times, or of another model, is refused by them. See `entry` for the targets.

        Args:
            budget: Share of computed steps.
            psnr: Least PSNR.
            speedup: Least speed-up.
            guarded: Whether a step is computed that the plan reuses, where the computed step before it has changed by more than
                `MARGIN` times what it did on the calibration prompt. The contexts of a step decide together then.

        Raises:
            ConfigError: Not exactly one target is given, or the plan was not calibrated to be guarded.
        """
        return self.settings(self.entry(budget, psnr=psnr, speedup=speedup), guarded)

    def settings(self, entry: PlanEntry, guarded: bool = False) -> CacheConfig:
        """Return the settings of an entry; see `at`."""
        made = self.provenance
        guard: dict[str, Any] = {}
        unnamed = sum(name.startswith(UNNAMED_PREFIX) for name in made.contexts)
        if guarded:
            if entry.indicators is None:
                raise ConfigError(
                    "guarded=True requires a plan that was calibrated with guarded=True; this one has no indicators of its steps."
                )
            bounds = [None if value is None else MARGIN * value for value in entry.indicators]
            joint = len(made.contexts) > 1
            order, damping = RULES["damped"]  # after a step that was added the weights have no row
            guard = {"policy": "guarded", "indicator_bounds": tuple(made.placed(bounds, None)), "order": order, "damping": damping}
            guard["decide"] = "joint" if joint else "separate"
        settings: dict[str, Any] = {
            "policy": "static",
            "steps_mask": tuple(made.placed([int(not computed) for computed in entry.mask], 0)),
            "reuse": "linear",
            "anchors": self.anchors,
            "cut": "output" if made.cut == "output" else "blocks",
            "weights": tuple(
                made.placed([None if computed else row for computed, row in zip(entry.mask, entry.weights, strict=True)], None)
            ),
            "timesteps": tuple(made.placed(made.timesteps, None)) if made.timesteps else None,
            "calibrated_for": made.model,
            "calls_per_step": max(1, unnamed),
        }
        return CacheConfig(**{**settings, **guard})

    def entry(self, budget: float | None = None, *, psnr: float | None = None, speedup: float | None = None) -> PlanEntry:
        """Return the entry for a target; warn and return the nearest one where the target cannot be met.

        Args:
            budget: Share of computed steps.
            psnr: Least PSNR in dB, as `PlanEntry.psnr_floor` has it: on the calibration prompt, or after `verify_plan` on unseen
                ones. The entry with the fewest computed steps is returned.
            speedup: Least speed-up by skipped steps; the entry with the highest PSNR is returned.

        Raises:
            ConfigError: Not exactly one target is given.
        """
        targets = {name: value for name, value in (("budget", budget), ("psnr", psnr), ("speedup", speedup)) if value is not None}
        if len(targets) != 1:
            raise ConfigError(f"pass exactly one of budget, psnr and speedup, got {', '.join(targets) or 'none'}.")
        if budget is not None:
            entry = min(self.entries, key=lambda e: abs(e.budget - budget))
            met = abs(entry.budget - budget) <= max(_BUDGET_SLACK, 0.5 / self.steps)
        elif psnr is not None:
            good = [e for e in self.entries if e.psnr_floor >= psnr]
            entry = min(good, key=lambda e: e.computed) if good else max(self.entries, key=lambda e: e.psnr_floor)
            met = bool(good)
        else:
            fast = [e for e in self.entries if e.speedup >= (speedup or 0)]
            entry = max(fast, key=lambda e: e.psnr_floor) if fast else max(self.entries, key=lambda e: e.speedup)
            met = bool(fast)
        if not met:
            ((name, value),) = targets.items()
            warn(
                f"no entry of this plan meets {name}={value:g}; the nearest one computes {entry.computed} of {self.steps} steps"
                f" ({entry.psnr_floor:.1f} dB, {entry.speedup:.2f}x). Calibrate with other budgets, or choose from the plan:\n{self}"
            )
        return entry

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data; its entries say how many steps they compute and whether fewer steps were closer."""
        return {
            "steps": self.steps,
            "anchors": self.anchors,
            "entries": [entry.to_dict() for entry in self.entries],
            "provenance": dataclasses.asdict(self.provenance),
        }

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        write_atomically(path, json.dumps({"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}, indent=1) + "\n")

    @staticmethod
    def load(path: str | Path) -> CalibrationPlan:
        """Read a plan that `save` wrote.

        Raises:
            ConfigError: The file holds no plan, or one of another version.
        """
        try:
            read = json.loads(Path(path).read_text())
            _check_header(read, path)
            return CalibrationPlan(tuple(_entry(entry) for entry in read["entries"]), _provenance(read["provenance"]))
        except ConfigError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is damaged ({type(error).__name__}: {error}). Calibrate again.") from error


def _check_header(read: Any, path: str | Path) -> None:
    if not isinstance(read, dict) or read.get("format") != FORMAT:
        raise ConfigError(f"{path} is not a calibration plan.")
    if read["version"] != VERSION:
        raise ConfigError(f"{path} has plan version {read['version']}, but this release reads {VERSION}. Calibrate again.")


def _entry(read: dict[str, Any]) -> PlanEntry:
    weights = tuple(tuple(map(float, row)) for row in read["weights"])
    if len(weights) != len(read["mask"]) or len({len(row) for row in weights}) != 1:
        raise TypeError("the weights do not fit the mask")
    indicators = None if read["indicators"] is None else tuple(read["indicators"])
    lists = {name: tuple(map(float, read[name])) for name in ("unseen", "unseen_fewer_steps")}
    return PlanEntry(**{**read, **lists, "mask": tuple(map(bool, read["mask"])), "weights": weights, "indicators": indicators})


def _provenance(read: dict[str, Any]) -> Provenance:
    lists = {name: tuple(read[name]) for name in ("timesteps", "step_indices", "contexts")}
    return Provenance(**{**read, **lists, "calls": tuple((int(step), str(name)) for step, name in read["calls"])})
