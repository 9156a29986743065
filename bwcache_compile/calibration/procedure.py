"""Calibrate: find out, on one prompt, which steps to compute and how to reuse the others."""

from __future__ import annotations

import itertools
import platform
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn

import bwcache_compile
from bwcache_compile.calibration import masks
from bwcache_compile.calibration.bounds import with_indicators
from bwcache_compile.calibration.cut_model import CutModel, OutputCut
from bwcache_compile.calibration.evaluate import Candidate, Evaluator, Generate, fixed_rule
from bwcache_compile.calibration.graph_cut import GraphCut
from bwcache_compile.calibration.plan import CalibrationPlan, Provenance
from bwcache_compile.calibration.plan_entry import PlanEntry
from bwcache_compile.calibration.progress import Progress
from bwcache_compile.calibration.recording import RecordedStep, context_names
from bwcache_compile.calibration.sampler_map import TOLERANCE, SamplerMap, first_difference, recover_map
from bwcache_compile.calibration.search import Search
from bwcache_compile.errors import ConfigError, warn
from bwcache_compile.graph_settings import Cut
from bwcache_compile.policies.reuse.linear import MOST_ANCHORS
from bwcache_compile.runtime.cached_model import CachedModel
from bwcache_compile.runtime.drop_in import DropIn
from bwcache_compile.runtime.fingerprint import model_identity

Effort = Literal["quick", "thorough"]
LIMITS: dict[str, float] = {"quick": 4.0, "thorough": 10.0}
"""What a calibration may cost, in full generations."""
_LEAST_STEPS = 4

_NOT_DETERMINISTIC = {
    "noise": "it starts from different noise each time. Create the random generator inside generate, with a fixed seed",
    "model": (
        "the model returns different outputs for equal inputs. Call model.eval(), and use deterministic kernels"
        " (torch.use_deterministic_algorithms(True))"
    ),
    "sampler": (
        "the sampler is not deterministic: after equal latents and outputs it returned different latents. If it draws noise at its steps,"
        " pass it a random generator with a fixed seed, created inside generate, or choose a deterministic sampler"
    ),
}


def calibrate(
    model: nn.Module | CutModel,
    generate: Generate,
    *,
    budgets: Sequence[float] = (0.4, 0.3, 0.2),
    anchors: int = 4,
    cut: Cut = "output",
    effort: Effort = "quick",
    progress: bool = True,
    fewer_steps: Callable[[Any, int], Any] | None = None,
    guarded: bool = False,
) -> CalibrationPlan:
    """Find, for each budget, which steps to compute and how to combine the last computed steps at the others.

    `generate` is called several times: once with every step computed, then with steps reused. Nothing needs to be known of the
    sampler: its steps are recovered from two generations, and the weights are fitted so that each reused step leads back to the
    latents of the full generation. Results are compared by PSNR.

    Args:
        model: What `transform` returned, captured in any way for cut="output" and whole for cut="blocks"; or for cut="output" the
            transformer itself, in evaluation mode, compiled or not; or a cut of your own (`CutModel`).
        generate: Makes one video with the model that it is given and returns it: `lambda model: pipe(...).frames` after
            `pipe.transformer = model`, or a loop. The seed must be fixed inside.
        budgets: Shares of computed steps.
        anchors: Computed steps that a reused step combines. Each costs one output per context.
        cut: Where the anchors are taken. "output" keeps the model's outputs, and a reused step runs nothing of the model; "blocks"
            keeps what the blocks return, and a reused step runs what is before and after them.
        effort: "quick" costs at most 4 full generations, "thorough" at most 10; more only where the budgets do not fit once each.
        progress: Whether to show a progress bar (where tqdm is installed) and say what is recorded.
        fewer_steps: Makes the same video with the plain model and another number of steps, `(model, steps) -> result`, to compare
            with; not counted in `effort`.
        guarded: Whether to run each entry once more, within `effort`, and record the indicator for `plan.at(..., guarded=True)`.
            The model must be what `transform` returned.

    Returns:
        The plan: an entry for each budget, and what it was made for.

    Raises:
        ConfigError: A setting is out of range, the weights cannot be read, or `generate` does not use its model or is not deterministic.
    """
    if effort not in get_args(Effort):
        raise ConfigError(f"effort must be one of {', '.join(map(repr, get_args(Effort)))}, got {effort!r}.")
    if not isinstance(budgets, Sequence) or not budgets:
        raise ConfigError(f"budgets must be a sequence of shares of computed steps, such as (0.4, 0.3, 0.2), got {budgets!r}.")
    if cut not in get_args(Cut):
        raise ConfigError(f"cut must be one of {', '.join(map(repr, get_args(Cut)))}, got {cut!r}.")
    for budget in budgets:
        masks.computed_count(budget, 2)
    target, to_guard = _cut_model(model, anchors, cut), _cached(model) if guarded else None
    identity = model_identity(target.module)
    with Progress(progress, LIMITS[effort]) as bar:
        evaluator = Evaluator(target, generate, bar.advance)
        bar.expect(evaluator.calls)
        if evaluator.steps < _LEAST_STEPS:
            raise ConfigError(
                f"generate ran {evaluator.steps} steps, but a calibration needs at least {_LEAST_STEPS}. Generate with more steps."
            )
        if evaluator.step_indices[0] and not _timesteps(evaluator.full):
            raise ConfigError(
                f"generate runs this model from step {evaluator.step_indices[0]} on, after another model, but none of its inputs is the"
                " timestep, which tells their steps apart. Pass no step_index to cache_context, so that each model counts its own steps."
            )
        sampler = _sampler_map(evaluator)
        counts = sorted({masks.computed_count(budget, evaluator.steps) for budget in budgets}, reverse=True)
        last = sum(counts) / evaluator.steps if guarded else 0.0
        found = Search(evaluator, sampler, LIMITS[effort] - last).run(counts)
    entries = [_entry(found[count], evaluator, fewer_steps) for count in counts]
    plan = CalibrationPlan(tuple(entries), _provenance(identity, target, evaluator, sampler, last))
    return plan if to_guard is None else with_indicators(plan, to_guard, generate)


def _cached(model: nn.Module | CutModel) -> DropIn:
    """Return the transformed model, which measures the indicator.

    Raises:
        ConfigError: It is not transformed.
    """
    cached = getattr(model, "_orig_mod", model)
    if not isinstance(cached, DropIn):
        raise ConfigError(f"guarded=True requires a transformed model, got {type(model).__name__}. Pass the result of transform.")
    return cached


def _cut_model(model: nn.Module | CutModel, anchors: int, cut: Cut) -> CutModel:
    """Return what runs the steps of a calibration.

    Raises:
        ConfigError: The anchors are at the blocks, and there is no graph of the model.
    """
    if not 2 <= anchors <= MOST_ANCHORS:
        raise ConfigError(f"anchors must be from 2 to {MOST_ANCHORS} (computed steps that a reused step combines), got {anchors!r}.")
    if not isinstance(model, nn.Module):
        return model
    cached = getattr(model, "_orig_mod", model)
    if cut == "output":
        return OutputCut(cached.original if isinstance(cached, DropIn) else model, anchors)
    if isinstance(cached, CachedModel):
        return GraphCut(cached, anchors, cut)
    if isinstance(cached, DropIn):
        raise ConfigError(f"cut='blocks' requires a model that is captured whole, and {cached!r} is not. Calibrate with cut='output'.")
    raise ConfigError(f"cut='blocks' requires a transformed model, got {type(model).__name__}. Pass the result of transform.")


def _sampler_map(evaluator: Evaluator) -> SamplerMap | None:
    """Recover the sampler's steps with a probe; None where the latents were not found.

    Raises:
        ConfigError: The generation is not deterministic.
    """
    mask = masks.probe_mask(evaluator.steps)
    probe, _ = evaluator.run(mask, fixed_rule("linear"))
    if evaluator.full[0].moving is None:
        warn(
            "no latents found: no input of the model changes from step to step and has the shape of the output. Weights cannot be fitted"
            " without them, so fixed rules of reuse are compared instead."
        )
        return None
    origin = first_difference(probe.recorder.steps, evaluator.full, mask)
    if origin != "same":
        raise ConfigError(f"generate cannot be calibrated: {_NOT_DETERMINISTIC[origin]}.")
    sampler = recover_map([probe.recorder.steps], evaluator.full)
    if not sampler.explained:
        step = max(range(len(sampler.residuals)), key=lambda i: sampler.residuals[i])
        warn(
            f"the sampler's steps are not a linear combination of latents and outputs (step {step}: {sampler.residual:.1%} unexplained)."
            " It may clip values, or scale guidance by the size of the outputs. Fixed rules of reuse are tried beside fitted weights."
        )
    return sampler


def _entry(candidate: Candidate, evaluator: Evaluator, fewer_steps: Callable[[Any, int], Any] | None) -> PlanEntry:
    plain = None if fewer_steps is None else evaluator.plain(sum(candidate.mask), fewer_steps)
    return PlanEntry(candidate.mask, candidate.table, candidate.psnr, candidate.rule, plain)


def _timesteps(steps: Sequence[RecordedStep]) -> tuple[float, ...]:
    """Return the time at each step: the first input that goes one way only."""
    for path in steps[0].times:
        values = [step.times.get(path, ()) for step in steps]
        if not all(values):
            continue
        times = [max(value) for value in values]
        rises = {a < b for a, b in itertools.pairwise(times) if a != b}
        if len(rises) == 1:
            return tuple(times)
    return ()


def _provenance(identity: str, cut: CutModel, evaluator: Evaluator, sampler: SamplerMap | None, last: float) -> Provenance:
    """Say what a plan was made for: the model of this identity; `last` is what is still to be spent, in full generations."""
    if sampler is None:
        words = "latents not found"
    elif sampler.explained:
        known = f"residual {sampler.residual:.0e}" if sampler.residual < TOLERANCE else "within the rounding of the latents"
        words = f"sampler recovered from {sampler.depth + 1} step{'s' * (sampler.depth > 0)} ({known})"
    else:
        words = f"sampler not linear (residual {sampler.residual:.0e})"
    versions = {name: sys.modules[name].__version__ for name in ("diffusers",) if name in sys.modules}
    versions |= {"bwcache_compile": bwcache_compile.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return Provenance(
        model=identity,
        timesteps=_timesteps(evaluator.full),
        step_indices=evaluator.step_indices,
        num_steps=evaluator.num_steps,
        contexts=context_names(evaluator.full),
        calls=tuple(evaluator.schedule),
        cut="blocks" if cut.reads_inputs else "output",
        anchor_bytes=0 if cut.reads_inputs else cut.anchors * evaluator.output_bytes,
        sampler=words,
        prompts=1,
        cost=round(evaluator.cost + last, 3),
        versions=versions,
    )
