"""What a plan that was calibrated on one prompt gives on unseen prompts, next to fewer steps with the same solver.

    python benchmarks/calibration.py --out benchmarks/results/calibration.json

The bundled model with guidance, 50 steps, Euler and UniPC. For each number of computed steps: PSNR against the full run of the
same noise, mean over seeds that nothing was calibrated on, with the 95 % interval of the paired difference to fewer steps.

The plan is verified on a few prompts of their own before (`verify_plan`), and what it then grants as a floor of PSNR is compared with the
mean over the seeds that are measured.
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

COMPUTED = (20, 16, 14, 10)
SOLVERS = ("euler", "unipc")
"""The quickstart's, and what Wan pipelines use (order 2)."""


def case(seed: int, clips: int) -> tuple[Tensor, Tensor]:
    """Draw a prompt and noise."""
    return data.encode(data.draw_attributes(clips, torch.Generator().manual_seed(seed))), tiny.draw_noise(clips, seed)


def measure(solver: str, budgets: tuple[float, ...], seeds: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """Calibrate on one seed, and run the plan on the others."""
    model, began = tiny.load(), time.perf_counter()
    how: dict[str, Any] = {"solver": solver, "guidance": args.guidance}
    tokens, noise = case(args.calibrate_on, args.prompts)

    def prompted(model: Any) -> Tensor:
        return tiny.sample(model, tokens, noise, args.steps, **how)

    def other(seed: int) -> Any:
        return lambda model: tiny.sample(model, *case(seed, args.clips), args.steps, **how)

    cached = bw.transform(model)
    plan = bw.calibrate(cached, prompted, budgets=budgets, effort=args.effort, cut=args.cut, progress=False)
    seconds = time.perf_counter() - began
    plan = bw.verify_plan(plan, cached, [other(seed) for seed in range(args.verify_from, args.verify_from + args.verify)])
    print(f"\n{solver}: {plan}\ncost {plan.provenance.cost:.2f} full generations", flush=True)
    ours: dict[int, list[float]] = {entry.computed: [] for entry in plan.entries}
    fewer: dict[int, list[float]] = {entry.computed: [] for entry in plan.entries}
    for seed in tqdm(seeds, desc=solver, mininterval=10):
        prompt = case(seed, args.clips)
        full = tiny.sample(model, *prompt, args.steps, **how)
        for entry in plan.entries:
            cached.configure(plan.at(entry.budget))
            ours[entry.computed].append(psnr(tiny.sample(cached, *prompt, args.steps, **how), full))
            fewer[entry.computed].append(psnr(tiny.sample(model, *prompt, entry.computed, **how), full))
    rows = [row(entry, ours[entry.computed], fewer[entry.computed]) for entry in plan.entries]
    return {"cost": plan.provenance.cost, "seconds": seconds, "rows": rows}


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
        "floor": entry.psnr_floor,
        "each_verified": [round(value, 2) for value in entry.unseen],
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
    parser.add_argument("--verify", type=int, default=8, help="prompts that the plan is verified on (default %(default)s)")
    parser.add_argument("--verify-from", type=int, default=4000, help="first seed of these (default %(default)s)")
    parser.add_argument("--first", type=int, default=5000, help="first seed of the prompts that are measured (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--clips", type=int, default=2, help="clips of each seed that is measured")
    parser.add_argument("--prompts", type=int, default=2, help="clips that are calibrated on, in one batch")
    parser.add_argument("--cut", choices=["output", "blocks"], default="output")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=tiny.GUIDANCE)
    args = parser.parse_args()
    budgets, seeds = tuple(n / args.steps for n in args.computed), list(range(args.first, args.first + args.seeds))
    said = {name: value for name, value in vars(args).items() if name != "out"}
    result: dict[str, Any] = {**said, "seeds": seeds, "versions": {"torch": torch.__version__}, "measured": {}}
    for solver in args.solvers:
        result["measured"][solver] = measure(solver, budgets, seeds, args)
        if args.out:
            write_record(args.out, result)
    print("\n| solver | computed | calibrated plan | floor | fewer steps | gain |\n|---|---|---|---|---|---|")
    for solver, found in result["measured"].items():
        for line in found["rows"]:
            gain = f"{line['gain']:+.1f} ± {line['interval']:.1f}"
            quality = f"{line['psnr']:.1f} dB | {line['floor']:.1f} dB | {line['fewer_steps']:.1f} dB"
            print(f"| {solver} | {line['computed']} | {quality} | {gain} |")


if __name__ == "__main__":
    main()
