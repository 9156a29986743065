"""Quality over computed steps of every way of running the bundled model with less work. Nothing here is timed.

    python benchmarks/frontier.py --out benchmarks/results/frontier.json

The bundled model with guidance (two contexts), under Euler and UniPC of order 2. For each number of computed steps every
way is tuned on seeds of its own (`frontier_protocol.py` says how) and then compared, on test seeds, with a plain run of as
many steps of the same solver: PSNR and SSIM against the full run of the same noise, and two scores against what was
requested (`frontier_score.py`). Computed steps are counted where the blocks run: a way that runs one block of twelve at its
reused steps pays for it. Differences are paired by seed, with Student's 95 % intervals.

`--store FILE` keeps every measurement, so that an interrupted run goes on. Where `--out` holds a record of the same seeds,
its rows stay unless they are measured again, so a new way needs no rerun of the others.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import logging
import os
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "tiny_video_dit"))


from benchmarks import frontier_cache_dit
from benchmarks.frontier_open_loop import open_loop
from benchmarks.frontier_ours import Calibrated
from benchmarks.frontier_protocol import Protocol, Store
from benchmarks.frontier_rivals import rivals
from benchmarks.frontier_score import Interval, draw_frontier
from benchmarks.frontier_ways import Case, FewerSteps, Indicators, PaperSchedule, Point, Way
from benchmarks.record import write_record

TUNING, TESTING = range(3500, 3504), 4000
MISSING = "not installed"
POINTS = "25,20,16,14,10,12/30"


def all_ways(tuning: list[Case]) -> list[Way]:
    """Return every way that can run here; say which cannot."""
    indicators = Indicators(tuning)
    ways: list[Way] = [FewerSteps(), *(PaperSchedule(reuse, indicators) for reuse in ("output", "taylor", "residual")), *rivals(tuning)]
    if frontier_cache_dit.installed():
        ways += [frontier_cache_dit.StepMasks(), frontier_cache_dit.DBCache(False), frontier_cache_dit.DBCache(True)]
    else:
        print("cache-dit is left out: not installed")
    return [*ways, *open_loop(tuning), Calibrated(tuning)]


def markdown(rows: Sequence[dict[str, Any]], scores: dict[str, Any]) -> str:
    """Lay out one solver's rows as a table, the best PSNR of each point in bold."""
    lines = ["| point | way | computed | PSNR | against fewer steps | SSIM | truth | attributes |", "|---" * 8 + "|"]
    for point in dict.fromkeys(row["point"] for row in rows):
        here = sorted((row for row in rows if row["point"] == point), key=lambda row: -row["psnr"])
        for row in here:
            gain = "" if row["way"] == FewerSteps.name else str(Interval(**row["against_fewer_steps"]["psnr"]))
            bold = "**" if row is here[0] else ""
            cells = [point, row["way"], f"{row['computed']:.1f}", f"{bold}{row['psnr']:.1f}{bold}", gain]
            cells += [f"{row['ssim']:.3f}", f"{row['truth']:.2f}", f"{row['attributes']:.3f}"]
            lines.append(f"| {' | '.join(cells)} |")
    for steps, score in scores.items():
        lines.append(
            f"\nFull runs of {steps} steps: truth {score['truth']:.2f} dB, attributes {score['attributes']:.3f};"
            f" noise: {score['noise_truth']:.2f} dB, {score['noise_attributes']:.3f}."
        )
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Name the versions of everybody who takes part."""
    found = {"python": platform.python_version(), "threads": str(torch.get_num_threads())}
    for package in ("torch", "diffusers", "cache-dit", "bwcache-compile"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = MISSING
    return found


def show(record: dict[str, Any], out: Path | None) -> None:
    """Print a table per solver, and plot each beside the record."""
    for solver, scores in record["full_runs"].items():
        rows = [row for row in record["rows"] if row["solver"] == solver]
        print(f"\n## {solver}\n\n{markdown(rows, scores)}\n", flush=True)
        drawn = [row for row in rows if row["steps"] == 50]
        if out and drawn:
            draw_frontier(drawn, f"{solver}, 50 steps", out.with_name(f"{out.stem}_{solver}.png"))


def place(row: dict[str, Any]) -> tuple[str, str, str]:
    """Return what a row is about."""
    return row["solver"], row["way"], row["point"]


def add_earlier(record: dict[str, Any], earlier: dict[str, Any]) -> None:
    """Add what an earlier record measured.

    Raises:
        ValueError: It is one of other seeds, or of other versions of torch or diffusers.
    """
    for name in ("clips_per_seed", "tuning_seeds", "test_seeds"):
        if earlier[name] != record[name]:
            raise ValueError(f"--out holds a record whose {name} are {earlier[name]}, and here they are {record[name]}: name another file")
    for package in ("torch", "diffusers"):
        if earlier["versions"][package] != record["versions"][package]:
            raise ValueError(f"--out holds a record of {package} {earlier['versions'][package]}: name another file")
    if record["versions"]["cache-dit"] == MISSING:
        record["versions"]["cache-dit"] = earlier["versions"]["cache-dit"]
    record["command"] = list(dict.fromkeys([*earlier["command"], *record["command"]]))
    for name in ("rows", "out_of_reach", "full_runs"):
        record[name] = earlier[name]


def main() -> None:
    """Measure, print a table per solver, write one JSON and its plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON; a plot per solver is written beside it")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--clips", type=int, default=1, help="clips per seed")
    parser.add_argument("--points", default=POINTS, help="computed steps of 50, or computed/steps (default %(default)s)")
    parser.add_argument("--solvers", default="euler,unipc")
    parser.add_argument("--ways", default="", help="only ways whose name contains one of these words, comma-separated")
    parser.add_argument("--store", type=Path, help="file of measurements to go on from")
    parser.add_argument("--table", type=Path, help="print the tables of a record, plot them, and run nothing")
    args = parser.parse_args()
    if args.table:
        return show(json.loads(args.table.read_text()), args.table)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("diffusers").setLevel(logging.ERROR)

    points = [Point.parse(text) for text in args.points.split(",")]
    testing = range(TESTING, TESTING + args.seeds)
    ways = all_ways([Case.of(seed, args.clips) for seed in TUNING])
    chosen = [way for way in ways if not args.ways or any(word in way.name for word in args.ways.split(","))]
    record: dict[str, Any] = {
        "command": ["python benchmarks/frontier.py " + " ".join(sys.argv[1:])],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": versions(),
        "machine": {"kind": platform.machine(), "cores": os.cpu_count()},
        "clips_per_seed": args.clips, "tuning_seeds": list(TUNING), "test_seeds": list(testing),
        "full_runs": {}, "rows": [], "out_of_reach": [],
    }  # fmt: skip
    if args.out and args.out.exists():
        add_earlier(record, json.loads(args.out.read_text()))
    store = Store(args.store)
    for solver in args.solvers.split(","):
        protocol = Protocol(solver, args.clips, TUNING, testing, store)
        scores = record["full_runs"].setdefault(solver, {})
        scores.update({str(steps): protocol.full_scores(steps) for steps in dict.fromkeys(p.steps for p in points)})
        print(f"{solver}: full runs {scores}", flush=True)
        for way in chosen:
            for point in points:
                began = time.perf_counter()
                row = protocol.measure(way, point)
                if row is None:
                    missing = {"solver": solver, "way": way.name, "point": str(point)}
                    record["out_of_reach"] = [other for other in record["out_of_reach"] if other != missing] + [missing]
                    print(f"{solver}, {point}: {way.name} cannot compute so few steps", flush=True)
                    continue
                record["rows"] = [other for other in record["rows"] if place(other) != place(row)] + [row]
                gain = Interval(**row["against_fewer_steps"]["psnr"])
                print(
                    f"{solver}, {point}: {way.name} computed {row['computed']:.1f}, {row['psnr']:.1f} dB,"
                    f" {gain} against fewer steps ({time.perf_counter() - began:.0f} s)",
                    flush=True,
                )
            if args.out:
                write_record(args.out, record)
    show(record, args.out)


if __name__ == "__main__":
    main()
