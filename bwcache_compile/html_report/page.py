"""Lay the report's data out as one HTML file that needs nothing else: style, script, drawings and pictures are inside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from bwcache_compile.atomic_write import write_atomically
from bwcache_compile.calibration import CalibrationPlan
from bwcache_compile.html_report import charts, formatting
from bwcache_compile.html_report.architecture import architecture
from bwcache_compile.html_report.data import Image, report_data
from bwcache_compile.html_report.drawing import Drawing
from bwcache_compile.printing import bytes_text


def write_report(
    path: str | Path,
    cached: nn.Module,
    *,
    plan: CalibrationPlan | None = None,
    images: Mapping[str, Image] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> Path:
    """Write what was found in a model, what the passes did to it, and what its last run did, as one HTML file.

    The file needs no network and no other file. It shows the blocks with their operators, rejected candidates, the diff of each
    pass, the indicator of each block and step, the schedule of each context, memory, settings and versions. Run the cached model
    first: before its first step there is no run to show. The file is written whole or not at all.

    Args:
        path: The file; one that is there is replaced.
        cached: What `transform` returned, compiled or not, captured.
        plan: A calibration, whose frontier is shown.
        images: Pictures by caption, such as a contact sheet: the bytes of a PNG, JPEG or WebP file, or its path.
        seconds: Times that you measured, by what you measured, such as `{"plain step": 0.8, "reused step": 0.01}`.

    Returns:
        The file's path.

    Raises:
        ConfigError: `cached` is no cached model, an image is no PNG, JPEG or WebP, or a time is not a finite number of seconds.
        ImportError: jinja2 is not installed.
        OSError: An image could not be read, or the file could not be written.
        StateError: Nothing is captured yet, or the model is closed.
    """
    page = render(report_data(cached, plan=plan, images=images, seconds=seconds))
    write_atomically(path, page)
    return Path(path)


def render(data: dict[str, Any]) -> str:
    """Return the page for what `report_data` returned.

    Raises:
        ImportError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise ImportError('a report needs jinja2: pip install "bwcache-compile[report]".') from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bwcache_compile.html_report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": bytes_text,
        "count": formatting.count_text,
        "shape": formatting.shape_text,
        "number": formatting.number_text,
        "decibels": formatting.decibels_text,
        "seconds": formatting.seconds_text,
        "stack_runs": formatting.stack_runs,
        "groups": formatting.diff_groups,
        "computed_steps": lambda mask: charts.ranges([step for step, computed in enumerate(mask) if computed]),
    }
    return environment.get_template("report.html.jinja").render(**data, drawings=drawings(data), slots=_slots(data["plan"]))


def drawings(data: dict[str, Any]) -> dict[str, Any]:
    """Return every drawing of the page: one, or one for each context, by name."""
    run, settings = data["run"], data["settings"]
    contexts, bounds = run["contexts"], charts.heat_bounds(run)
    heat: dict[str, Drawing] = {}
    if bounds is not None:
        heat = {name: charts.heat_map(name, context, run["blocks"], bounds) for name, context in contexts.items()}
    threshold = settings["threshold"] if settings["policy"] != "static" and isinstance(settings["threshold"], float) else None
    return {
        "architecture": architecture(data),
        "schedule": {name: charts.schedule(name, context, run["anchors"]) for name, context in contexts.items()},
        "heat": heat,
        "bounds": bounds,
        "levels": charts.LEVELS,
        "curve": charts.curve(run, threshold),
        "frontier": None if data["frontier"] is None else charts.frontier(data["frontier"]),
    }


def _slots(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for the slots of each role, shape and dtype."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for region in plan["regions"]:
        for slot in region["slots"]:
            key = slot["role"], formatting.shape_text(slot)
            row = rows.setdefault(key, {"role": key[0], "tensor": key[1], "count": 0, "bytes": 0})
            row["count"] += 1
            row["bytes"] += slot["bytes"]
    return list(rows.values())
