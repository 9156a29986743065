"""What each tool makes of the same schedule: the same steps computed and reused, through the call that a pipeline makes.

    python benchmarks/equal_schedule.py --out benchmarks/results/equal_schedule.json --table equal_schedule.md
    python benchmarks/equal_schedule.py --sizes 32x64x4 --modes eager --repeats 3

The ideal of the schedule is the plain model at the computed steps and prologue and epilogue alone (a model without blocks) at the
reused ones. What is reused at cut="output" runs neither, and can be below it. Each step calls the model in the contexts "cond" and
"uncond". Contexts are named as most pipelines of diffusers do, without the index of the step: ours finds it by the time.

Modes: "eager"; "whole", `torch.compile` of the model; "regional", `compile_repeated_blocks` of diffusers, while ours is
`torch.compile(cached)` again. Every contestant has a process of its own; they take turns, generation by generation, and medians of
steps are compared. One whose steps are not those of the mask is refused, and the record says so. Each starts with an empty cache
of compiled code. In "regional" nothing of prologue and epilogue is compiled but in ours.

Runs on the CPU, on one thread. Memory is what torch's profiler says that one generation allocates at most, weights left out. State
is what a tool keeps between two steps, as our report says and as the tensors in the others' states add up to.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.equal_contestants import (
    ANCHORS,
    CONTESTANTS,
    MASK,
    MODES,
    OURS_CUT,
    OURS_LINEAR,
    OURS_OUTPUT,
    PLAIN,
    SHELL,
    Compilation,
    Size,
    left_out,
)  # fmt: skip
from benchmarks.equal_worker import Worker, serve
from benchmarks.overhead import versions
from benchmarks.record import write_record

GOAL_SIZE = "1024x256x12"
GOALS = (
    (f"reused step of {OURS_LINEAR}, / {SHELL}", OURS_LINEAR, "reused_step_over_prologue_and_epilogue", 1.15),
    (f"reused step of {OURS_OUTPUT}, / {SHELL}", OURS_OUTPUT, "reused_step_over_prologue_and_epilogue", None),
    (f"reused step of {OURS_CUT}, / {SHELL}", OURS_CUT, "reused_step_over_prologue_and_epilogue", 0.5),
    (f"state of {ANCHORS} anchors of {OURS_CUT}, / one hidden state", OURS_CUT, "state_over_hidden_state", None),
)


class Process:
    """A contestant's process, asked one thing at a time."""

    def __init__(self, make: Callable[[], Any], threads: int | None = 1, cache: str | None = None) -> None:
        """Start it. It is a fresh one, not a copy of this one; see `serve` for what it takes."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["benchmarks.equal_worker"])  # imports torch and diffusers once
        self._connection: Connection
        self._connection, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, make, threads, cache), daemon=True)
        self._process.start()
        other.close()

    def ask(self, method: str, seconds: float | None = None) -> tuple[Any, str]:
        """Run a method of its `Worker` and return the result, or None and why there is none: it may take that many seconds."""
        try:
            self._connection.send(method)
            if not self._connection.poll(seconds):
                self._process.kill()
                self._process.join(10)
                return None, f"stopped: {method} took more than {seconds:.0f} s"
            return self._connection.recv()
        except (EOFError, OSError):
            self._process.join(10)
            return None, f"its process ended with code {self._process.exitcode}"

    def end(self) -> None:
        """Let it go."""
        if self._process.is_alive():
            self._connection.send(None)
        self._process.join(60)
        self._process.kill()


def row(seconds: Sequence[float], of_plain: Sequence[float], of_shell: Sequence[float]) -> dict[str, float]:
    """Compare a contestant's steps with the ideal of the schedule.

    Args:
        seconds: Median seconds of each step.
        of_plain: The same of the plain model.
        of_shell: The same of prologue and epilogue.
    """
    ideal = [alone if reuses else full for full, alone, reuses in zip(of_plain, of_shell, MASK, strict=True)]
    computed, reused = ([a / b for a, b, m in zip(seconds, ideal, MASK, strict=True) if m == kind] for kind in (0, 1))
    return {
        "run_over_ideal": sum(seconds) / sum(ideal),
        "speed_up_over_plain": sum(of_plain) / sum(seconds),
        "step_ms": 1e3 * statistics.mean(seconds),
        "computed_step_over_plain": statistics.median(computed),
        "reused_step_over_prologue_and_epilogue": statistics.median(reused),
    }


def measure(size: Size, how: Compilation, repeats: int, names: Sequence[str]) -> dict[str, Any]:
    """Compare everybody at one size compiled in one way."""
    began = time.perf_counter()
    processes = {name: Process(functools.partial(Worker, name, size, how)) for name in names}
    facts: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}
    try:
        for name, process in processes.items():
            facts[name], why = process.ask("warm_up")
            if why:
                refused[name] = why
            print(f"  {size} {how.mode}: {name}: {why or 'ready'} after {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        if PLAIN in refused or SHELL in refused:
            raise SystemExit(f"the ideal could not be measured: {refused}")
        taking_part = [name for name in names if name not in refused]
        runs: dict[str, list[list[float]]] = {name: [] for name in taking_part}
        for _ in range(repeats):
            for name in taking_part:
                seconds, why = processes[name].ask("run") if name not in refused else (None, "")
                if why:
                    refused[name] = why
                elif seconds:
                    runs[name].append(seconds)
        for name in runs.keys() - refused.keys():
            facts[name]["compiled_while_timed"], _ = processes[name].ask("compiled_while_timed")
    finally:
        for process in processes.values():
            process.end()
    medians = {name: [statistics.median(step) for step in zip(*runs[name], strict=True)] for name in runs if name not in refused}
    rows = {}
    for name, seconds in medians.items():
        rows[name] = {**row(seconds, medians[PLAIN], medians[SHELL]), **facts[name]}
        rows[name]["state_over_hidden_state"] = facts[name]["state_bytes"] / len(size.contexts) / size.hidden_bytes
    return {
        "size": str(size),
        "mode": how.mode,
        "plain_step_ms": 1e3 * statistics.mean(medians[PLAIN]),
        "prologue_and_epilogue_ms": 1e3 * statistics.mean(medians[SHELL]),
        "took_seconds": time.perf_counter() - began,
        "rows": rows,
        "refused": refused,
    }


def goals(measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what our reused steps and state cost at the size of the goals, with the goal where there is one."""
    found = []
    for part in measured:
        for title, name, key, at_most in GOALS if part["size"] == GOAL_SIZE else ():
            if name in part["rows"]:
                found.append({"mode": part["mode"], "what": title, "ratio": part["rows"][name][key], "at_most": at_most})
    return found


def table(measured: Sequence[dict[str, Any]], absent: dict[str, str]) -> str:
    """Return the measurements as Markdown."""
    lines = []
    for part in measured:
        lines += [
            f"### {part['size']}, {part['mode']}: plain {part['plain_step_ms']:.2f} ms a step of two calls, prologue and epilogue"
            f" {part['prologue_and_epilogue_ms']:.2f} ms",
            "",
            "| tool | run / ideal | speed-up | computed step / plain | reused step / p. and e. | state, hidden states | peak MiB | graphs"
            " | breaks | recompiles | compile s |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for name, r in part["rows"].items():
            if name != SHELL:
                of_schedule = [f"{r[k]:.2f}" for k in ("run_over_ideal", "speed_up_over_plain", "computed_step_over_plain")]
                reused = f"{r['reused_step_over_prologue_and_epilogue']:.2f}"
                shown = ["", "", "", ""] if name == PLAIN else [*of_schedule, reused]
                shown += [f"{r['state_over_hidden_state']:.2f}", f"{r['peak_bytes'] / 2**20:.2f}"]
                shown += [*(str(r[key]) for key in ("graphs", "graph_breaks", "recompiles")), f"{r['compile_seconds']:.0f}"]
                lines.append(f"| {name} | " + " | ".join(shown) + " |")
        lines += [f"| {name} | refused: {why} |" + " |" * 9 for name, why in part["refused"].items()]
        lines.append("")
    if rows := goals(measured):
        lines += [f"| at {GOAL_SIZE} | mode | ratio | goal |", "|---|---|---|---|"]
        for r in rows:
            lines.append(f"| {r['what']} | {r['mode']} | {r['ratio']:.3f} | {'' if r['at_most'] is None else r['at_most']} |")
        lines.append("")
    return "\n".join([*lines, *(f"{name} is left out: {why}." for name, why in absent.items())])


def main() -> None:
    """Measure, print a table, write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the record")
    parser.add_argument("--table", type=Path, help="where to write the table, which is printed as well")
    parser.add_argument("--sizes", type=Size.parse, nargs="+", default=[Size.parse(GOAL_SIZE), Size.parse("32x64x12")])
    parser.add_argument("--modes", choices=MODES, nargs="+", default=list(MODES))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tools", choices=CONTESTANTS, nargs="+", default=list(CONTESTANTS), help="plain and shell always take part")
    parser.add_argument("--backend", default="inductor", help='of torch.compile; "eager" counts graphs, breaks and recompiles in seconds')
    args = parser.parse_args()
    absent = left_out()
    names = [name for name in CONTESTANTS if name in (PLAIN, SHELL, *args.tools) and name not in absent]
    measured: list[dict[str, Any]] = []
    for size in args.sizes:
        for mode in args.modes:
            measured.append(measure(size, Compilation(mode, args.backend), args.repeats, names))
            if args.out:  # what is measured is kept if a later part fails
                record = {
                    "command": "python benchmarks/equal_schedule.py " + " ".join(sys.argv[1:]),
                    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                    "versions": {**versions(), "threads": "1"},
                    "machine": {"kind": platform.machine(), "cores": os.cpu_count()},
                    "schedule": MASK,
                    "repeats": args.repeats,
                    "backend": args.backend,
                    "left_out": absent,
                    "measured": measured,
                    "goals": goals(measured),
                }
                write_record(args.out, record)
    text = table(measured, absent)
    print(text)
    if args.table:
        args.table.write_text(text + "\n")


if __name__ == "__main__":
    main()
