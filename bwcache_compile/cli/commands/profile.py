"""Show how much each block changes from step to step."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bwcache_compile as bw
from bwcache_compile.cli.generation import generation
from bwcache_compile.cli.models import head, loaded, transformed
from bwcache_compile.cli.named import Named
from bwcache_compile.cli.outcome import CommandError
from bwcache_compile.cli.plot import write_plot
from bwcache_compile.cli.screen import Screen, table
from bwcache_compile.cli.written import check_writable
from bwcache_compile.ir.compare import Verify

_LEVELS = " ▁▂▃▄▅▆▇█"


def profile_model(
    screen: Screen,
    named: Named,
    steps: int,
    sampler: str | None,
    tokens: int,
    png: Path | None,
    blocks: Sequence[str] | None,
    verify: Verify,
) -> None:
    """Compute every step of a generation and show how much each block changes at each step.

    Raises:
        CommandError: Nothing was measured, or the plot cannot be written.
    """
    if png is not None:
        check_writable(png)
    source = loaded(screen, named)
    config = bw.CacheConfig(policy="adaptive", threshold=0, indicator_tokens="all" if tokens == 1 else tokens)
    cached = transformed(screen, source, config, blocks, verify=verify)
    with screen.progress("profiling", None if sampler else steps) as step:
        made = generation(source, sampler, steps, step)
        made.make(cached)
    report = cached.report()
    measured = {name: context for name, context in report.contexts.items() if any(r.indicator is not None for r in context.steps)}
    if not measured:
        raise CommandError("nothing was measured: the generation has to call the model that it is given at two steps or more")
    if png is not None:
        write_plot(png, dataclasses.replace(report, contexts=measured), f"{source.title}: {made.how}")
    document = {**head(source), "generation": made.how, **report.to_dict()}
    parts: list[Any] = [f"{source.title}: relative change of each block's output from step to step; {made.how}"]
    for name, context in measured.items():
        records = [record for record in context.steps if record.indicator is not None and record.change is not None]
        means, smallest = [record.indicator or 0.0 for record in records], context.smallest()
        parts += ["", f"context {name}: {len(context.steps)} steps, mean over the blocks", f"  {_curve(means)}"]
        if smallest is not None:
            parts.append(f"  smallest {smallest.indicator:.4f} at step {smallest.step}, largest {max(means):.4f}")
        columns = ("block", f"steps {records[0].step} to {records[-1].step}", "min", "mean", "max")
        by_step = [record.change.tolist() for record in records if record.change is not None]
        changes = zip(report.blocks, zip(*by_step, strict=True), strict=True)
        rows = [(block, _curve(row), *(f"{value:.4f}" for value in (min(row), statistics.mean(row), max(row)))) for block, row in changes]
        parts.append(table(columns, rows, columns[2:]))
    screen.show(document, *parts)


def _curve(values: Sequence[float]) -> str:
    """Draw values as a line of bars, the largest one full; `?` stands for what is not finite."""
    top = max(filter(math.isfinite, values), default=0.0) or 1.0
    return "".join(_LEVELS[round(value / top * (len(_LEVELS) - 1))] if math.isfinite(value) else "?" for value in values)
