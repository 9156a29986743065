"""Lay a record of the frontier benchmark out as the table of the README: `python -m benchmarks.frontier_summary RECORD`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def summary(record: dict[str, Any]) -> str:
    """Return a Markdown table: a way per row, the best first, and PSNR in dB at each number of computed steps per solver."""
    points = [(row["solver"], row["asked"], row["steps"]) for row in record["rows"] if row["way"] == "fewer steps"]
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
    order = sorted(cells, key=lambda way: -sum(cells[way][p]["psnr"] for p in points if p in cells[way]) / len(cells[way]))
    lines = [f"| PSNR in dB | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    lines += [f"| {way} | {' | '.join(shown(cells[way], point) for point in points)} |" for way in order]
    return "\n".join(lines)


if __name__ == "__main__":
    print(summary(json.loads(Path(sys.argv[1]).read_text())))
