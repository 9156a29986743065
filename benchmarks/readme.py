"""Put the tables of committed records into the pages that show them: `python -m benchmarks.readme`. A test compares them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.frontier_summary import summary

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SOLVERS = {"euler": "Euler", "unipc": "UniPC"}


def quickstart(record: dict[str, Any]) -> str:
    """Return the quickstart's table: a row for each way of running, the speed-up and the quality under each solver."""
    heads = [f"{name}: {what}" for name in SOLVERS.values() for what in ("computed", "speed-up", "PSNR")]
    names = dict.fromkeys(name for solver in SOLVERS for name in record[solver]["rows"])
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name in names:
        cells = []
        for solver in SOLVERS:
            row = record[solver]["rows"].get(name)
            cells += ["", "", ""] if row is None else [str(row["computed"]), f"{row['speed_up']:.2f}x", f"{row['psnr']:.1f} dB"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def equal_schedule(record: dict[str, Any]) -> str:
    """Return, for each tool, the whole run against its ideal at each size and mode; a reused step and the state at the first of them."""
    parts = record["measured"]
    names = [f"{part['size'].rpartition('x')[0]}, {part['mode']}" for part in parts]
    heads = [*names, f"{names[0]}: reused step", f"{names[0]}: state"]
    lines = [f"| tool | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for tool, first in parts[0]["rows"].items():
        if tool in ("plain", "prologue and epilogue"):
            continue
        cells = [f"{part['rows'][tool]['run_over_ideal']:.2f}" for part in parts]
        cells += [f"{first['reused_step_over_prologue_and_epilogue']:.2f}", f"{first['state_over_hidden_state']:.2f}"]
        lines.append(f"| {tool} | {' | '.join(cells)} |")
    return "\n".join(lines)


def calibration(record: dict[str, Any]) -> str:
    """Return a row for each solver and number of computed steps."""
    lines = ["| solver | computed | calibrated | floor | plain steps | gain |", "|---" * 6 + "|"]
    for solver, found in record["measured"].items():
        for row in found["rows"]:
            gain = f"{row['gain']:+.1f} ± {row['interval']:.1f}"
            quality = f"{row['psnr']:.1f} dB | {row['floor']:.1f} dB | {row['fewer_steps']:.1f} dB"
            lines.append(f"| {SOLVERS[solver]} | {row['computed']} | {quality} | {gain} |")
    return "\n".join(lines)


def defaults(record: dict[str, Any]) -> str:
    """Return a row for each setting: computed steps, PSNR, and the gain over as many plain steps, per solver."""
    rows = {(row["solver"], row["settings"]): row for row in record["rows"]}
    heads = [f"{name}: {what}" for name in SOLVERS.values() for what in ("computed", "PSNR", "gain")]
    lines = [f"| settings | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for settings in dict.fromkeys(row["settings"] for row in record["rows"]):
        cells = []
        for row in (rows[solver, settings] for solver in SOLVERS):
            cells += [f"{row['computed']:.1f}", f"{row['psnr']:.1f} dB", f"{row['gain']:+.1f} ± {row['interval']:.1f}"]
        lines.append(f"| {settings} | {' | '.join(cells)} |")
    return "\n".join(lines)


def compile_time(record: dict[str, Any]) -> str:
    """Return the processor seconds of compiling: a row for each way, a column for each depth."""
    rows = record["processor_seconds"]
    heads = [head if "/" in head else f"{head} blocks" for head in next(iter(rows.values()))]
    lines = [f"| processor seconds | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(map(str, row.values()))} |" for name, row in rows.items())])


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "quickstart": ("README.md", quickstart),
    "frontier": ("README.md", summary),
    "equal_schedule": ("README.md", equal_schedule),
    "compile_time": ("docs/compile.md", compile_time),
    "calibration": ("docs/calibration.md", calibration),
    "defaults": ("examples/tiny_video_dit/README.md", defaults),
}
"""Which record, under marks of its name, gives which table of which page."""


def section(name: str) -> re.Match[str]:
    """Find the place of a table in its page."""
    page = TABLES[name][0]
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", (ROOT / page).read_text(), re.DOTALL)
    assert found is not None, f"{page} has no place for {name}"
    return found


def table(name: str) -> str:
    """Return a table from its committed record."""
    return TABLES[name][1](json.loads((RESULTS / f"{name}.json").read_text()))


def main() -> None:
    """Write every table into its page."""
    for name, (page, _) in TABLES.items():
        place = section(name)
        (ROOT / page).write_text(place.string[: place.start(1)] + table(name) + "\n" + place.string[place.end(1) :])


if __name__ == "__main__":
    main()
