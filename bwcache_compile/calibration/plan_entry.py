"""One budget of a calibration: which steps to compute, how to reuse the others, and what that gives."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

_STUDENT_95 = (6.31, 2.92, 2.35, 2.13, 2.02, 1.94, 1.89, 1.86, 1.83, 1.81)
"""Student's t for one side, 95 %, of 1 degree of freedom, 2, and so on; the last serves all more."""


def _standard_error(values: Sequence[float]) -> float:
    """Return the standard error of a mean; 0 for a single value, of which nothing is known."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


@dataclasses.dataclass(frozen=True)
class PlanEntry:
    """What to do for one budget.

    Attributes:
        mask: For each step, whether it is computed.
        weights: For each step, the weights of the anchors, newest first; zeros where the step is computed.
        psnr: PSNR in dB on the calibration prompt, against the generation in which every step is computed.
        rule: How the weights were found: "fitted", or a fixed rule ("hold", "linear", "damped").
        fewer_steps_psnr: PSNR of the plain model with as many steps as this entry computes; None where it was not measured.
        indicators: For each step, the mean of the contexts' indicators on the calibration prompt; None at steps that measure nothing,
            and for all where the plan was not calibrated to be guarded.
        unseen: PSNR in dB on each of the prompts of `verify_plan`; empty where it was not called.
        unseen_fewer_steps: The same of the plain model with as many steps; empty where it was not measured.
    """

    mask: tuple[bool, ...]
    weights: tuple[tuple[float, ...], ...]
    psnr: float
    rule: str = "fitted"
    fewer_steps_psnr: float | None = None
    indicators: tuple[float | None, ...] | None = None
    unseen: tuple[float, ...] = ()
    unseen_fewer_steps: tuple[float, ...] = ()

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
    def amplification(self) -> tuple[float, int]:
        """The largest norm of a reused step's weights, by which noise in the anchors is amplified, and the step."""
        return max((math.hypot(*row), step) for step, row in enumerate(self.weights))

    @property
    def psnr_floor(self) -> float:
        """PSNR in dB that the mean over prompts is above, with 95 % confidence, by the unseen ones; else that on the calibration prompt."""
        if not self.unseen:
            return self.psnr
        quantile = _STUDENT_95[min(len(self.unseen) - 1, len(_STUDENT_95)) - 1]
        return statistics.mean(self.unseen) - quantile * _standard_error(self.unseen)

    @property
    def fewer_steps_wins(self) -> bool:
        """Whether the plain model with as many steps is closer to the full generation, as far as it was measured."""
        if self.unseen_fewer_steps:
            return statistics.mean(self.unseen_fewer_steps) > statistics.mean(self.unseen)
        return self.fewer_steps_psnr is not None and self.fewer_steps_psnr > self.psnr

    @property
    def verified(self) -> str:
        """What `verify_plan` found, as a sentence: means over the prompts with their standard errors."""
        ours, plain = self.unseen, self.unseen_fewer_steps
        text = f"on {len(ours)} unseen prompt{'s' * (len(ours) > 1)}, {self.computed} computed steps: {statistics.mean(ours):.1f} dB"
        text += f" ± {_standard_error(ours):.1f}"
        return text + (f", {self.computed} plain steps: {statistics.mean(plain):.1f} dB" if plain else "")

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as plain data, with what follows from its mask and its figures."""
        follows = ("computed", "budget", "speedup", "psnr_floor", "fewer_steps_wins")
        return {**dataclasses.asdict(self), **{name: getattr(self, name) for name in follows}}
