"""Put the tables of committed records into the README: `python -m benchmarks.readme`. A test compares them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.frontier_summary import summary

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def quickstart(record: dict[str, Any]) -> str:
    """Return the quickstart's table: a row for each way of running, the speed-up and the quality under each solver."""
    solvers = {"euler": "Euler", "unipc": "UniPC"}
    heads = [f"{solvers[solver]}: {what}" for solver in solvers for what in ("computed", "speed-up", "PSNR")]
    names = dict.fromkeys(name for solver in solvers for name in record[solver]["rows"])
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name in names:
        cells = []
        for solver in solvers:
            row = record[solver]["rows"].get(name)
            cells += ["", "", ""] if row is None else [str(row["computed"]), f"{row['speed_up']:.2f}x", f"{row['psnr']:.1f} dB"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def equal_schedule(record: dict[str, Any]) -> str:
    """Return, for each tool and size, the whole run against its ideal, a reused step, and what is kept between two steps."""
    parts = record["measured"]
    heads = [
        f"{part['size'].rpartition('x')[0]}, {part['mode']}: {what}" for part in parts for what in ("run / ideal", "reused step", "state")
    ]
    lines = [f"| tool | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for tool in parts[0]["rows"]:
        if tool in ("plain", "prologue and epilogue"):
            continue
        cells = []
        for row in (part["rows"][tool] for part in parts):
            cells.append(f"{row['run_over_ideal']:.2f}")
            cells += [f"{row['reused_step_over_prologue_and_epilogue']:.2f}", f"{row['state_over_hidden_state']:.2f}"]
        lines.append(f"| {tool} | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"quickstart": quickstart, "frontier": summary, "equal_schedule": equal_schedule}
"""Which record gives which table: the record's name and the marks in the README."""


def section(text: str, name: str) -> re.Match[str]:
    """Find the place of a table."""
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)
    assert found is not None, f"the README has no place for {name}"
    return found


def table(name: str) -> str:
    """Return a table from its committed record."""
    return TABLES[name](json.loads((RESULTS / f"{name}.json").read_text()))


def main() -> None:
    """Write every table into the README."""
    path = ROOT / "README.md"
    text = path.read_text()
    for name in TABLES:
        place = section(text, name)
        text = text[: place.start(1)] + table(name) + "\n" + text[place.end(1) :]
    path.write_text(text)


if __name__ == "__main__":
    main()
