"""Run generations with steps reused, measure them against the full one, and count what that costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from bwcache_compile.calibration.cut_model import CutModel
from bwcache_compile.calibration.generation import Generation, Mask, Rule, StandIn
from bwcache_compile.calibration.quality import psnr
from bwcache_compile.calibration.recording import RecordedStep, Recorder
from bwcache_compile.calibration.rules import rule_weights
from bwcache_compile.calibration.sampler_map import difference
from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import ConfigError
from bwcache_compile.runtime.drop_in import DropIn

Generate = Callable[[Any], Any]
"""The user's function: makes one video with the model that it is given, and returns it."""

Table = tuple[tuple[float, ...], ...]


def generated(cached: DropIn, settings: CacheConfig, generate: Generate) -> Any:
    """Return what `generate` makes with a cached model by these settings, from an empty cache."""
    cached.configure(settings)
    cached.reset()
    return generate(cached)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mask with weights, measured.

    Attributes:
        mask: Which steps are computed.
        table: The weights of each step.
        psnr: Against the full generation.
        rule: How the weights were found.
        drift: At each step, the distance of the latents from the full generation's; empty where they were not found.
    """

    mask: Mask
    table: Table
    psnr: float
    rule: str
    drift: tuple[float, ...] = ()


def fixed_rule(name: str) -> Rule:
    """Return a rule of `rules.RULES` for running a generation."""
    return lambda run, key, args, kwargs: rule_weights(name, run.anchors[key], run.recorder.step, run.cut.anchors)


class Evaluator:
    """Runs generations of one prompt.

    Attributes:
        cut: The model.
        full: The generation in which every step was computed.
        schedule: Step and context of each of its calls.
        step_indices: Index of each step among those of all models of the generation, as far as the caller's contexts say.
        num_steps: Steps of all models.
        output_bytes: Bytes of the outputs of one step.
        spent: Calls of the model that were computed so far.
    """

    def __init__(self, cut: CutModel, generate: Generate, on_call: Callable[[Recorder], None] = lambda recorder: None) -> None:
        """Run the full generation.

        Raises:
            ConfigError: `generate` did not call the model it was given.
        """
        self.cut, self._generate, self._on_call = cut, generate, on_call
        self.spent = 0
        run, self._reference = self._run(Generation(cut, Recorder(keeps_calls=cut.reads_inputs), on_call=on_call))
        if not run.recorder.steps:
            raise ConfigError("generate did not call the model that it was given. Use its argument: `generate=lambda model: ...`.")
        self.calls = run.computed_calls
        self.full: list[RecordedStep] = run.recorder.steps
        self.schedule, self.output_bytes = run.recorder.schedule, run.recorder.output_bytes
        self._moving_input = run.recorder.moving_input
        given = [step.index for step in self.full if step.index is not None]
        told = len(given) == len(self.full) and given == sorted(set(given))
        self.step_indices = tuple(given) if told else tuple(range(self.steps))
        self.num_steps = max(self.step_indices[-1] + 1, (run.recorder.num_steps or 0) if told else 0)

    @property
    def steps(self) -> int:
        """Steps of a generation."""
        return len(self.full)

    @property
    def cost(self) -> float:
        """What was spent so far, in full generations."""
        return self.spent / self.calls

    def _run(self, run: Generation) -> tuple[Generation, Any]:
        result = self._generate(StandIn(run))
        run.recorder.close()
        self.spent += run.computed_calls
        return run, result

    def run(self, mask: Mask, rule: Rule) -> tuple[Generation, float]:
        """Run one generation; return it and its PSNR.

        Raises:
            ConfigError: It had fewer calls than the full one.
        """
        recorder = Recorder(self._moving_input, self.schedule)
        run, result = self._run(Generation(self.cut, recorder, mask, rule, self._on_call))
        if len(recorder.schedule) != len(self.schedule):
            raise ConfigError(
                f"generate called the model {len(self.schedule)} times at first and {len(recorder.schedule)} times now. It must make one"
                " generation with the same calls each time."
            )
        return run, psnr(result, self._reference)

    def candidate(self, mask: Mask, rule: Rule, name: str) -> Candidate:
        """Run one generation; return it with its weights as a candidate."""
        run, quality = self.run(mask, rule)
        zeros = (0.0,) * self.cut.anchors
        table = tuple(tuple(run.weights[step].tolist()) if step in run.weights else zeros for step in range(self.steps))
        drift: tuple[float, ...] = ()
        if self.full[0].moving is not None:
            drift = tuple(float(difference(run.recorder.steps, self.full, step, "", 0).norm()) for step in range(self.steps))
        return Candidate(mask, table, quality, name, drift)

    def plain(self, steps: int, generate: Callable[[Any, int], Any]) -> float:
        """Return the PSNR of the plain model with fewer steps."""
        return psnr(generate(self.cut.module, steps), self._reference)
