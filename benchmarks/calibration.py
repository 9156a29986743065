"""What a plan that was calibrated on one prompt gives on unseen prompts, next to fewer steps with the same solver.

    python benchmarks/calibration.py --out benchmarks/results/calibration.json

The bundled model with guidance, 50 steps, Euler and UniPC. For each number of computed steps: PSNR against the full run of the
same noise, mean over seeds that nothing was calibrated on, with the 95 % interval of the paired difference to fewer steps.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "tiny_video_dit"))

import data
import model as tiny

import bwcache_compile as bw
from benchmarks.record import write_record
from bwcache_compile.calibration.quality import psnr

STEPS = 50
COMPUTED = (20, 16, 14, 10)
SOLVERS = ("euler", "unipc")
"""The quickstart's, and what Wan pipelines use (order 2)."""


def case(seed: int, clips: int) -> tuple[Tensor, Tensor]:
    """Draw a prompt and noise."""
    return data.encode(data.draw_attributes(clips, torch.Generator().manual_seed(seed))), tiny.draw_noise(clips, seed)


def measure(solver: str, budgets: tuple[float, ...], effort: Any, calibrated: int, seeds: list[int], clips: int) -> dict[str, Any]:
    """Calibrate on one seed, and run the plan on the others."""
    model, began = tiny.load(), time.perf_counter()
    tokens, noise = case(calibrated, clips)
    plan = bw.calibrate(
        model, lambda m: tiny.sample(m, tokens, noise, STEPS, solver=solver), budgets=budgets, effort=effort, progress=False
    )
    seconds = time.perf_counter() - began
    print(f"\n{solver}: {plan}\ncost {plan.provenance.cost:.2f} full generations", flush=True)
    ours: dict[int, list[float]] = {entry.computed: [] for entry in plan.entries}
    fewer: dict[int, list[float]] = {entry.computed: [] for entry in plan.entries}
    cached = bw.transform(model)
    for seed in tqdm(seeds, desc=solver, mininterval=10):
        prompt = case(seed, clips)
        full = tiny.sample(model, *prompt, STEPS, solver=solver)
        for entry in plan.entries:
            cached.configure(plan.at(entry.budget))
            ours[entry.computed].append(psnr(tiny.sample(cached, *prompt, STEPS, solver=solver), full))
            fewer[entry.computed].append(psnr(tiny.sample(model, *prompt, entry.computed, solver=solver), full))
    rows = [row(entry, ours[entry.computed], fewer[entry.computed]) for entry in plan.entries]
    return {"cost": plan.provenance.cost, "seconds": seconds, "effort": effort, "calibrated_on": calibrated, "rows": rows}


def row(entry: Any, ours: list[float], fewer: list[float]) -> dict[str, Any]:
    """Summarize one entry over the seeds."""
    gains = [a - b for a, b in zip(ours, fewer, strict=True)]
    interval = 1.96 * statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
    return {
        "computed": entry.computed,
        "psnr": statistics.mean(ours),
        "fewer_steps": statistics.mean(fewer),
        "gain": statistics.mean(gains),
        "interval": interval,
        "calibration_psnr": entry.psnr,
        "mask": "".join("#" if computed else "." for computed in entry.mask),
        "each": [round(value, 2) for value in ours],
        "each_fewer": [round(value, 2) for value in fewer],
    }


def main() -> None:
    """Measure, print a table, write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    parser.add_argument("--computed", nargs="+", type=int, default=COMPUTED)
    parser.add_argument("--effort", choices=["quick", "thorough"], default="quick")
    parser.add_argument("--calibrate-on", type=int, default=3000, help="seed of the prompt that is calibrated on (default %(default)s)")
    parser.add_argument("--first", type=int, default=5000, help="first seed of the prompts that are measured (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--clips", type=int, default=2)
    args = parser.parse_args()
    budgets, seeds = tuple(n / STEPS for n in args.computed), list(range(args.first, args.first + args.seeds))
    result: dict[str, Any] = {"steps": STEPS, "seeds": seeds, "clips": args.clips, "versions": {"torch": torch.__version__}, "solvers": {}}
    for solver in args.solvers:
        result["solvers"][solver] = measure(solver, budgets, args.effort, args.calibrate_on, seeds, args.clips)
        if args.out:
            write_record(args.out, result)
    print("\n| solver | computed | calibrated plan | fewer steps | gain |\n|---|---|---|---|---|")
    for solver, found in result["solvers"].items():
        for line in found["rows"]:
            gain = f"{line['gain']:+.1f} ± {line['interval']:.1f}"
            print(f"| {solver} | {line['computed']} | {line['psnr']:.1f} dB | {line['fewer_steps']:.1f} dB | {gain} |")


if __name__ == "__main__":
    main()
