"""What caching costs and saves on a GPU: plain, ours, other caches at the same schedule, ONNX Runtime and AOTInductor.

    python benchmarks/gpu.py --out benchmarks/results/gpu.json --table gpu.md
    python benchmarks/gpu.py --tiny --device cpu --out tiny.json

Two shapes in bfloat16: a small one whose time goes into launching, with the contexts of guidance, and Wan 2.1's 1.3 B transformer with
random weights at 81 frames of 832 x 480, with one context. Every contestant is told to compute and reuse the same steps (the schedule of
`equal_schedule.py`) and has a process of its own: one that fails or takes too long is recorded with its error. The most wanted come
first, and what is left when `--seconds` are over is recorded as not run; `--resume` goes on with it. The record is written anew after
each contestant.

A step is timed until the device is done. A whole run waits at its end alone, and is compared with the ideal of the schedule: the plain
model at the computed steps and prologue and epilogue alone at the reused ones, in the same mode where that was measured. Compiled
code is kept from one contestant to the next, so compile seconds are those of what is new. Host reads are counted by torch's profiler.
Contestants run one after another, so what the device does meanwhile (clocks, other users) is in the figures.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.equal_contestants import MASK, OURS_OUTPUT, PLAIN, SHELL, left_out
from benchmarks.equal_schedule import Process
from benchmarks.gpu_contestants import (
    COMPILED,
    EAGER,
    GRAPHS,
    ORT,
    ROUNDS,
    SAME_NUMBERS,
    GpuWorker,
    WanShape,
    compilation,
    shapes,
)
from benchmarks.overhead import versions
from benchmarks.record import write_record

LEAST_SECONDS = 15.0
"""A contestant is not begun with less time than this."""

Row = dict[str, Any]


def key(name: str, mode: str) -> str:
    """Name a contestant in a mode."""
    return f"{name} ({mode})"


def measured(make: Any, deadline: float, device: str, cache: str) -> tuple[Row, str]:
    """Measure one contestant in a process of its own.

    Returns:
        What was found, and why there is no more where it failed.
    """
    process = Process(make, threads=1 if device == "cpu" else None, cache=cache)
    row: Row = {}
    try:
        for method in ("ready", "watched", "timed"):
            found, why = process.ask(method, max(1.0, deadline - time.monotonic()))
            if why:
                return row, why
            row |= found
    finally:
        process.end()
    return row, ""


def _ideal(rows: Mapping[str, Row], mode: str) -> float | None:
    """Return the seconds of the schedule's ideal run, from the plain model in the same mode, or in the nearest that was measured."""
    for nearest in {EAGER: (EAGER,), GRAPHS: (GRAPHS, COMPILED)}.get(mode, (COMPILED, EAGER)):
        pair = [rows.get(key(name, nearest)) for name in (SHELL, PLAIN)]
        if all(row and "run_seconds" in row for row in pair):
            alone, full = (row["run_seconds"] / row["steps"] for row in pair if row)
            return sum(alone if reuses else full for reuses in MASK)
    return None


def _difference(sample: Sequence[float], reference: Sequence[float]) -> float:
    found, expected = torch.tensor(sample), torch.tensor(reference)
    return float((found - expected).norm() / expected.norm())


def compared(rows: Mapping[str, Row]) -> dict[str, Row]:
    """Add to each row how it compares with the plain model, with the ideal, and with what ours returns eagerly."""
    made = {}
    ours = rows.get(key(OURS_OUTPUT, EAGER), {}).get("sample")
    for title, row in rows.items():
        row = dict(row)
        if row["name"] not in (PLAIN, SHELL) and "run_seconds" in row:
            ideal, plain = _ideal(rows, row["mode"]), rows.get(key(PLAIN, row["mode"]), rows.get(key(PLAIN, EAGER), {}))
            row["run_over_ideal"] = row["run_seconds"] / ideal if ideal else None
            per_step = plain["run_seconds"] / plain["steps"] if "run_seconds" in plain else None
            row["speed_up_over_plain"] = len(MASK) * per_step / row["run_seconds"] if per_step else None
            if row["name"] in SAME_NUMBERS and ours:
                row["difference_from_ours_eager"] = _difference(row["sample"], ours)
        made[title] = row
    return made


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _reads(row: Row, step: str) -> str:
    counts = row.get("host_reads", {}).get(step)
    return "" if counts is None else " / ".join(f"{count:g}" for count in counts.values())


def table(record: Mapping[str, Any]) -> str:
    """Return the record as Markdown."""
    lines = [f"{record['device']}, torch {record['versions']['torch']}. Host reads are scalar reads / stream waits / copies to the host."]
    for name, part in record["shapes"].items():
        lines += [
            "",
            f"### {name}: {part['shape']}",
            "",
            "| contestant | mode | computed step, ms | reused step, ms | run, s | run / ideal | speed-up | reads, computed | reads, reused"
            " | peak GiB | state MiB | compile s | ready s | difference from ours, eager |",
            "|" + "---|" * 14,
        ]
        for row in compared(part["rows"]).values():
            if row["why"]:
                lines.append(f"| {row['name']} | {row['mode']} | {row['why']} |" + " |" * 11)
                continue
            shown = [_number(row["computed_step_ms"], 3), _number(row["reused_step_ms"], 3), _number(row["run_seconds"], 3)]
            shown += [_number(row.get("run_over_ideal")), _number(row.get("speed_up_over_plain"))]
            shown += [_reads(row, "computed step"), _reads(row, "reused step"), _number(row["peak_bytes"] / 2**30)]
            shown += [_number(row["state_bytes"] / 2**20), _number(row["compile_seconds"], 0), _number(row["ready_seconds"], 0)]
            difference = row.get("difference_from_ours_eager")
            shown.append("" if difference is None else f"{difference:.1e}")
            lines.append(f"| {row['name']} | {row['mode']} | " + " | ".join(shown) + " |")
        if part["not_run"]:
            lines += ["", f"Not run, no time was left: {', '.join(part['not_run'])}."]
    lines += ["", *(f"{name} is left out: {why}." for name, why in record["left_out"].items())]
    return "\n".join(lines)


def _about(args: argparse.Namespace, device: str) -> dict[str, Any]:
    found = {**versions(), "onnxruntime": "not installed"}
    for package in ("onnxruntime-gpu", "onnxruntime"):
        if importlib.util.find_spec("onnxruntime"):
            try:
                found["onnxruntime"] = f"{importlib.metadata.version(package)} ({package})"
                break
            except importlib.metadata.PackageNotFoundError:
                continue
    return {
        "command": "python benchmarks/gpu.py " + " ".join(sys.argv[1:]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {**found, "cuda": str(torch.version.cuda)},
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "machine": {"kind": platform.machine(), "cores": os.cpu_count()},
        "schedule": MASK,
        "seconds": args.seconds,
    }


def absent(device: str) -> dict[str, str]:
    """Say which contestants cannot take part here, and why."""
    missing = left_out()
    if not importlib.util.find_spec("onnxruntime"):
        return {**missing, ORT: "onnxruntime is not installed"}
    import onnxruntime

    if device == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        missing[ORT] = "this onnxruntime has no CUDA provider; install onnxruntime-gpu"
    return missing


def jobs(chosen: Mapping[str, WanShape], names: Sequence[str] | None, missing: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Return shape, contestant and mode of all that is to be measured, the most wanted first."""
    return [
        (shape, name, mode)
        for each in ROUNDS
        for shape in chosen
        for name, mode in each
        if name not in missing and (names is None or name in names)
    ]


def main() -> None:
    """Measure, print a table, write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the record")
    parser.add_argument("--table", type=Path, help="where to write the table, which is printed as well")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes that a CPU runs in seconds, to try the script")
    parser.add_argument("--backend", help="of torch.compile; inductor, or for --tiny aot_eager, which compiles in no time")
    parser.add_argument("--seconds", type=float, default=540.0, help="after which nothing is measured any more")
    parser.add_argument("--each", type=float, default=200.0, help="the most seconds of one contestant")
    parser.add_argument("--shapes", choices=("launch-bound", "wan"), nargs="+", default=["launch-bound", "wan"])
    parser.add_argument("--names", nargs="+", help="contestants, as the table names them; all by default")
    parser.add_argument("--resume", action="store_true", help="keep what --out holds, and measure what it lacks")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --tiny --device cpu tries the script")
    backend = args.backend or ("aot_eager" if args.tiny else "inductor")
    missing = absent(args.device)
    found = {name: shape for name, shape in shapes(args.device, args.tiny).items() if name in args.shapes}
    record: dict[str, Any] = {**_about(args, args.device), "left_out": missing, "shapes": {}}
    if args.resume and args.out and args.out.exists():
        record["shapes"] = json.loads(args.out.read_text())["shapes"]
    for name, shape in found.items():
        part = record["shapes"].setdefault(name, {"shape": str(shape), "rows": {}})
        part["not_run"] = []
    with tempfile.TemporaryDirectory() as cache:
        for shape, name, mode in jobs(found, args.names, missing):
            part, title = record["shapes"][shape], key(name, mode)
            if title in part["rows"] and not part["rows"][title]["why"]:
                continue
            now = time.monotonic()
            if deadline - now < LEAST_SECONDS:
                part["not_run"].append(title)
            else:
                make = functools.partial(GpuWorker, name, found[shape], compilation(mode, backend))
                row, why = measured(make, min(deadline, now + args.each), args.device, cache)
                part["rows"][title] = {"name": name, "mode": mode, "why": why, **row, "took_seconds": time.monotonic() - now}
                print(f"  {shape}: {title}: {why or 'measured'} after {time.monotonic() - now:.0f} s", file=sys.stderr, flush=True)
            if args.out:  # what is measured is kept if a later contestant fails
                write_record(args.out, record)
    text = table(record)
    print(text)
    if args.table:
        args.table.write_text(text + "\n")


if __name__ == "__main__":
    main()
