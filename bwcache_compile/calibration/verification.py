"""Run the entries of a plan on prompts that it was not calibrated on: what a target of quality is worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from bwcache_compile.calibration.evaluate import Generate, generated
from bwcache_compile.calibration.plan import CalibrationPlan
from bwcache_compile.calibration.quality import psnr
from bwcache_compile.errors import ConfigError
from bwcache_compile.runtime.drop_in import DropIn


def verify_plan(
    plan: CalibrationPlan,
    model: nn.Module,
    prompts: Sequence[Generate],
    fewer_steps: Sequence[Callable[[Any, int], Any]] | None = None,
) -> CalibrationPlan:
    """Measure every entry of a plan on other prompts. `plan.at(psnr=...)` goes by them from then on.

    Each prompt costs one generation with every step computed and one by each entry. One prompt says little of others: the bundled model's
    PSNR differs by 5 dB from prompt to prompt, so give 8 or more for a mean within 2 dB.

    Args:
        plan: What `calibrate` returned, or `CalibrationPlan.load`.
        model: What `transform` returned for the model of the plan, compiled or not. Its own settings and contexts are not touched.
        prompts: For each prompt a function like `generate` of `calibrate`, with a seed fixed inside.
        fewer_steps: For each prompt a function that makes the same video with the plain model and another number of steps,
            `(model, steps) -> result`, to compare with.

    Returns:
        The plan with `PlanEntry.unseen`, one PSNR in dB for each prompt, and `PlanEntry.unseen_fewer_steps`, in place of earlier ones.

    Raises:
        ConfigError: The model is not transformed, there are no prompts, `fewer_steps` are not as many, or a prompt's function does not call
            its model or makes other calls than the plan was made for.
        StateError: The plan belongs to another model, or the times of a prompt's steps are others.
    """
    cached = getattr(model, "_orig_mod", model)
    if not isinstance(cached, DropIn):
        raise ConfigError(f"verify_plan requires a transformed model, got {type(model).__name__}. Pass the result of transform.")
    if not isinstance(prompts, Sequence) or not prompts:
        raise ConfigError("prompts must be a sequence of functions like `generate`, one for each prompt to verify the plan on.")
    if fewer_steps is not None and len(fewer_steps) != len(prompts):
        raise ConfigError(f"fewer_steps must hold one function for each prompt: {len(prompts)} prompts, got {len(fewer_steps)}.")
    unseen: list[list[float]] = [[] for _ in plan.entries]
    plain: list[list[float]] = [[] for _ in plan.entries]
    full = dataclasses.replace(plan.settings(plan.entries[0]), steps_mask=(0,) * plan.provenance.num_steps, weights=None)
    running = cached.with_settings(full)
    try:
        for number, generate in enumerate(prompts):
            reference = generated(running, full, generate)
            _check_ran(running, plan, number)
            for place, entry in enumerate(plan.entries):
                unseen[place].append(psnr(generated(running, plan.settings(entry), generate), reference))
                if fewer_steps is not None:
                    plain[place].append(psnr(fewer_steps[number](cached.original, entry.computed), reference))
    finally:
        running.close()
    measured = zip(plan.entries, unseen, plain, strict=True)
    entries = (dataclasses.replace(entry, unseen=tuple(ours), unseen_fewer_steps=tuple(theirs)) for entry, ours, theirs in measured)
    return dataclasses.replace(plan, entries=tuple(entries))


def _check_ran(running: DropIn, plan: CalibrationPlan, number: int) -> None:
    steps = {name: len(context.steps) for name, context in running.report().contexts.items()}
    if not steps or set(steps.values()) != {plan.steps}:
        ran = ", ".join(f"{count} steps of {name}" for name, count in steps.items()) or "no step"
        raise ConfigError(
            f"prompts[{number}] ran {ran} of the model that it was given, but the plan has {plan.steps} steps. Call the argument as in"
            " `calibrate`: `lambda model: ...`."
        )
