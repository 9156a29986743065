"""Lay a record of the frontier benchmark out as the table of the README: `python -m benchmarks.frontier_summary RECORD`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

LEAST = 3
"""Ways that a number of computed steps must have been measured with to get a column."""


def summary(record: dict[str, Any]) -> str:
    """Return a Markdown table of PSNR in dB: a way per row, the largest mean gain over fewer steps first.

    Columns are the numbers of computed steps that at least `LEAST` ways were measured with, by solver, the most first.
    """
    points = [(row["solver"], row["asked"], row["steps"]) for row in record["rows"] if row["way"] == "fewer steps"]
    count = Counter((row["solver"], row["asked"], row["steps"]) for row in record["rows"])
    points = sorted((point for point in points if count[point] >= LEAST), key=lambda point: (point[0], -point[1]))
    cells: dict[str, dict[tuple[str, int, int], dict[str, Any]]] = {}
    for row in record["rows"]:
        cells.setdefault(row["way"], {})[row["solver"], row["asked"], row["steps"]] = row
    best = {point: max(found[point]["psnr"] for found in cells.values() if point in found) for point in points}

    def shown(found: dict[tuple[str, int, int], dict[str, Any]], point: tuple[str, int, int]) -> str:
        if point not in found:
            return ""
        value = found[point]["psnr"]
        return f"**{value:.1f}**" if value == best[point] else f"{value:.1f}"

    solvers = {"euler": "Euler", "unipc": "UniPC"}
    heads = [f"{solvers[solver]}, {computed} of {steps}" for solver, computed, steps in points]
    plain = cells["fewer steps"]

    def gain(way: str) -> float:
        shared = [point for point in points if point in cells[way]]
        return sum(cells[way][point]["psnr"] - plain[point]["psnr"] for point in shared) / len(shared)

    order = sorted((way for way in cells if any(point in cells[way] for point in points)), key=gain, reverse=True)
    lines = [f"| PSNR in dB | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    lines += [f"| {way} | {' | '.join(shown(cells[way], point) for point in points)} |" for way in order]
    return "\n".join(lines)


if __name__ == "__main__":
    print(summary(json.loads(Path(sys.argv[1]).read_text())))
