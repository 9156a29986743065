"""Find out which steps to compute and how to reuse the others, and save the plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bwcache_compile as bw
from bwcache_compile.cli.generation import generation
from bwcache_compile.cli.models import head, loaded, transformed
from bwcache_compile.cli.named import Named
from bwcache_compile.cli.outcome import CommandError
from bwcache_compile.cli.screen import Screen
from bwcache_compile.cli.written import check_writable


def calibrate_model(
    screen: Screen,
    named: Named,
    out: Path,
    steps: int,
    sampler: str | None,
    budgets: Sequence[float],
    anchors: int,
    cut: Any,
    effort: Any,
) -> None:
    """Calibrate a model and save the plan, whole or not at all.

    Raises:
        CommandError: The plan cannot be written, or the model has no latents and no sampler was given.
        ConfigError: See `calibrate`.
    """
    check_writable(out)
    source = loaded(screen, named)
    model: Any = source.model if cut == "output" else transformed(screen, source, None, verify="close")
    with screen.progress("calibrating, steps so far") as step:
        made = generation(source, sampler, steps, step)
        if not made.moves:
            raise CommandError(
                f"no input of {source.title} has the shape of its output, so there are no latents to denoise; pass --generate"
                " module:function with a sampler of your own"
            )
        plan = bw.calibrate(model, made.make, budgets=budgets, anchors=anchors, cut=cut, effort=effort, progress=False)
    try:
        plan.save(out)
    except OSError as error:
        raise CommandError(f"cannot write {out}: {error.strerror}") from error
    document = {**head(source), "generation": made.how, "plan": str(out), **plan.to_dict()}
    screen.show(document, f"{source.title}: {made.how}", str(plan), f"saved {out}; use it with --plan {out} --at BUDGET")
