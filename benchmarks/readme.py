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


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"quickstart": quickstart, "frontier": summary}
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
