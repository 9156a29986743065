"""The result of a calibration: for each budget, which steps to compute and how to reuse the others."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bwcache_compile.calibration.masks import mask_text
from bwcache_compile.errors import ConfigError, StateError, warn

FORMAT = "bwcache-calibration"
VERSION = 1
_SAMPLE = 64
_BUDGET_SLACK = 0.02
_TIME_SLACK = 1e-2
"""Relative; a time in bfloat16 is off by 4e-3."""


@dataclasses.dataclass(frozen=True)
class PlanEntry:
    """What to do for one budget.

    Attributes:
        mask: For each step, whether it is computed.
        weights: For each step, the weights of the anchors, newest first; zeros where the step is computed.
        psnr: PSNR in dB on the calibration prompt, against the generation in which every step is computed.
        rule: How the weights were found: "fitted", or a fixed rule ("hold", "linear", "damped").
        fewer_steps_psnr: PSNR of the plain model with as many steps as this entry computes; None where it was not measured.
    """

    mask: tuple[bool, ...]
    weights: tuple[tuple[float, ...], ...]
    psnr: float
    rule: str = "fitted"
    fewer_steps_psnr: float | None = None

    @property
    def computed(self) -> int:
        """Number of computed steps."""
        return sum(self.mask)

    @property
    def budget(self) -> float:
        """Share of computed steps."""
        return self.computed / len(self.mask)

    @property
    def speedup(self) -> float:
        """Speed-up of the model's calls if a reused step cost nothing."""
        return len(self.mask) / self.computed

    @property
    def fewer_steps_wins(self) -> bool:
        """Whether the plain model with as many steps is closer to the full generation, as far as it was measured."""
        return self.fewer_steps_psnr is not None and self.fewer_steps_psnr > self.psnr


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What a plan was made for.

    Attributes:
        model: Class of the model.
        weights: Fingerprint of its weights, see `fingerprint`.
        dtype: Of its first parameter.
        timesteps: The time at each step; empty where none was found.
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
    weights: str
    dtype: str
    timesteps: tuple[float, ...]
    contexts: tuple[str, ...]
    calls: tuple[tuple[int, str], ...]
    cut: str
    anchor_bytes: int
    sampler: str
    prompts: int
    cost: float
    versions: dict[str, str]


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
        """Steps of a generation."""
        return len(self.entries[0].mask)

    @property
    def anchors(self) -> int:
        """Computed steps that a reused step combines."""
        return len(self.entries[0].weights[0])

    def __str__(self) -> str:
        """Lay the frontier out as a table."""
        made = self.provenance
        size = f" ({made.anchor_bytes / 2**20:.2f} MiB)" if made.anchor_bytes else ""
        lines = [
            f"calibration of {made.model} for {self.steps} steps, {self.anchors} anchors at the {made.cut}{size},"
            f" {made.prompts} prompt{'s' * (made.prompts > 1)}; {made.sampler}",
            f"{'computed':>9} {'speed-up':>9} {'PSNR':>9} {'fewer steps':>12}  weights  steps (# computed, . reused)",
        ]
        for entry in self.entries:
            fewer = "" if entry.fewer_steps_psnr is None else f"{entry.fewer_steps_psnr:.1f} dB"
            advice = f"  advice: run {entry.computed} plain steps instead" if entry.fewer_steps_wins else ""
            numbers = f"{entry.computed:9} {entry.speedup:8.2f}x {entry.psnr:6.1f} dB {fewer:>12}"
            lines.append(f"{numbers}  {entry.rule:7}  {mask_text(entry.mask)}{advice}")
        return "\n".join(lines)

    def at(self, *, budget: float | None = None, psnr: float | None = None, speedup: float | None = None) -> PlanEntry:
        """Return the entry for a target; warn and return the nearest one where the target cannot be met.

        Args:
            budget: Share of computed steps.
            psnr: Least PSNR in dB on the calibration prompt; the entry with the fewest computed steps is returned.
            speedup: Least speed-up by skipped steps; the entry with the highest PSNR is returned.

        Raises:
            ConfigError: Not exactly one target is given.
        """
        targets = {name: value for name, value in (("budget", budget), ("psnr", psnr), ("speedup", speedup)) if value is not None}
        if len(targets) != 1:
            raise ConfigError(f"at() takes exactly one of budget, psnr and speedup, got {', '.join(targets) or 'none'}.")
        if budget is not None:
            entry = min(self.entries, key=lambda e: abs(e.budget - budget))
            met = abs(entry.budget - budget) <= _BUDGET_SLACK
        elif psnr is not None:
            good = [e for e in self.entries if e.psnr >= psnr]
            entry = min(good, key=lambda e: e.computed) if good else max(self.entries, key=lambda e: e.psnr)
            met = bool(good)
        else:
            fast = [e for e in self.entries if e.speedup >= (speedup or 0)]
            entry = max(fast, key=lambda e: e.psnr) if fast else max(self.entries, key=lambda e: e.speedup)
            met = bool(fast)
        if not met:
            ((name, value),) = targets.items()
            warn(
                f"no entry of this plan meets {name}={value:g}; the nearest one computes {entry.computed} of {self.steps} steps"
                f" ({entry.psnr:.1f} dB, {entry.speedup:.2f}x). Calibrate with other budgets, or choose from the plan:\n{self}"
            )
        return entry

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model that the plan was not made for.

        Raises:
            StateError: Class, dtype or weights differ.
        """
        made, model = self.provenance, getattr(model, "_orig_mod", model)
        facts = (("class", made.model, type(model).__name__), ("dtype", made.dtype, dtype_of(model)))
        for name, then, now in facts:
            if then != now:
                raise StateError(f"this plan was calibrated for a model of {name} {then}, got {now}. Calibrate this model.")
        if made.weights != fingerprint(model):
            raise StateError(f"this plan was calibrated for a {made.model} with other weights. Calibrate again with these weights.")

    def check_run(self, *, timesteps: Sequence[float] = (), contexts: Sequence[str] = ()) -> None:
        """Refuse a generation that the plan was not made for. What is left out, or was not known at calibration, is not compared.

        Raises:
            StateError: Timesteps or contexts differ.
        """
        made = self.provenance
        if contexts and tuple(contexts) != made.contexts:
            raise StateError(
                f"this plan was calibrated with the contexts {', '.join(made.contexts)}, but this run has {', '.join(contexts)}."
                " Calibrate with the same guidance."
            )
        if not timesteps or not made.timesteps:
            return
        if len(timesteps) != len(made.timesteps):
            raise StateError(f"this plan was calibrated for {self.steps} steps, but this run has {len(timesteps)}. Calibrate for them.")
        for step, time in enumerate(timesteps):
            self.check_time(step, [(time,)])

    def check_time(self, step: int, times: Iterable[Sequence[float]]) -> None:
        """Refuse a step none of whose inputs is the time that it had at calibration, if that is known.

        Args:
            step: Index of the step.
            times: Values of each input that may be the time.

        Raises:
            StateError: There is no such input.
        """
        if not self.provenance.timesteps:
            return
        then, values = self.provenance.timesteps[step], [max(value) for value in times if value]
        if not any(abs(then - now) <= _TIME_SLACK * max(abs(then), abs(now)) for now in values):
            now = min(values, key=lambda value: abs(value - then), default=math.nan)
            raise StateError(
                f"this plan was calibrated with time {then:g} at step {step}, but this run has {now:g}. Calibrate with this scheduler and"
                " number of steps."
            )

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        path = Path(path)
        text = json.dumps({"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}, indent=1)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text + "\n")
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

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
            raise ConfigError(f"{path} is damaged: {error}. Calibrate again.") from error


def _check_header(read: Any, path: str | Path) -> None:
    if not isinstance(read, dict) or read.get("format") != FORMAT:
        raise ConfigError(f"{path} is not a calibration plan.")
    if read["version"] != VERSION:
        raise ConfigError(f"{path} has version {read['version']} of calibration plans, but this release reads {VERSION}.")


def _entry(read: dict[str, Any]) -> PlanEntry:
    weights = tuple(tuple(map(float, row)) for row in read["weights"])
    if len(weights) != len(read["mask"]) or len({len(row) for row in weights}) != 1:
        raise TypeError("the weights do not fit the mask")
    return PlanEntry(**{**read, "mask": tuple(map(bool, read["mask"])), "weights": weights})


def _provenance(read: dict[str, Any]) -> Provenance:
    lists = {"timesteps": tuple(read["timesteps"]), "contexts": tuple(read["contexts"])}
    return Provenance(**{**read, **lists, "calls": tuple((int(step), str(name)) for step, name in read["calls"])})


def dtype_of(model: nn.Module) -> str:
    """Return the dtype of a model's first parameter; empty if it has none."""
    first = next(model.parameters(), None)
    return "" if first is None else str(first.dtype).removeprefix("torch.")


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Return a hash over the names, shapes and dtypes of a model's weights, and over a sample of their values."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda pair: pair[0]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // _SAMPLE)][:_SAMPLE]
        values = torch.view_as_real(sample) if sample.is_complex() else sample
        digest.update(np.ascontiguousarray(values.double().cpu().numpy()).tobytes())
    return digest.hexdigest()[:32]
