"""Draw the indicator over the steps of a run as a PNG file."""

from __future__ import annotations

import io
import math
from pathlib import Path

from bwcache_compile.atomic_write import write_atomically
from bwcache_compile.cli.outcome import CommandError
from bwcache_compile.report import ContextReport, Report


def write_plot(path: Path, report: Report, title: str) -> None:
    """Write a line for each block and a thick one for their mean, a panel for each context; whole or not at all.

    Raises:
        CommandError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise CommandError('--png needs matplotlib: pip install "bwcache-compile[plot]"') from error
    figure = Figure(figsize=(4.5 * len(report.contexts) + 1, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    for place, (name, context) in enumerate(report.contexts.items(), start=1):
        axes = figure.add_subplot(1, len(report.contexts), place)
        steps, rows = _rows(context)
        for number, block in enumerate(report.blocks):
            axes.plot(
                steps,
                [row[number] for row in rows],
                color="tab:blue",
                alpha=0.3,
                linewidth=0.8,
                label="a block" * (block == report.blocks[0]),
            )
        axes.plot(steps, [sum(row) / len(row) for row in rows], color="black", linewidth=1.8, label="mean")
        axes.set(title=name, xlabel="step", ylabel="relative L1 change", ylim=(0, None))
        axes.legend(frameon=False, fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    try:
        write_atomically(path, picture.getvalue())
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from error


def _rows(context: ContextReport) -> tuple[list[int], list[list[float]]]:
    """Return the measured steps and the change of each block there; what is not finite is left out of the line."""
    measured = [record for record in context.steps if record.change is not None and record.indicator is not None]
    rows = [
        [value if math.isfinite(value) else math.nan for value in record.change.tolist()]
        for record in measured
        if record.change is not None
    ]
    return [record.step for record in measured], rows
