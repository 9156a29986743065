"""What `transform(model)` gives with no settings, next to fewer steps and to the paper's schedule over its thresholds.

    python benchmarks/defaults.py --out benchmarks/results/defaults.json

The bundled model with guidance, 50 steps, Euler and UniPC: steps computed and PSNR against the full run of the same noise, mean
over seeds that nothing was tuned on, with the 95 % interval of the paired difference to a plain run with as many steps.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "tiny_video_dit"))

import model as tiny

import bwcache_compile as bw
from benchmarks.frontier_ways import Case
from benchmarks.record import write_record
from bwcache_compile.calibration.quality import psnr

STEPS = 50
SETTINGS: dict[str, bw.CacheConfig] = {
    "transform(model)": bw.CacheConfig.recommended(),
    **{f"adaptive, threshold {t}": bw.CacheConfig.recommended(threshold=t) for t in (0.03, 0.1)},
    "recommended, decide='joint'": bw.CacheConfig.recommended(decide="joint"),
    "recommended, cut='output'": bw.CacheConfig.recommended(cut="output", decide="joint"),
    **{f"paper, threshold {t}": bw.CacheConfig.paper(threshold=t, num_steps=STEPS) for t in (0.02, 0.04, 0.08, 0.15, 0.3)},
}


def measure(cached: bw.CachedModel, config: bw.CacheConfig, cases: list[Case], solver: tiny.Solver, full: list[Any]) -> dict[str, Any]:
    """Run one setting on every case; a plain run of as many steps is the rival of each."""
    cached.configure(config)
    ours, fewer, computed = [], [], []
    for case, reference in zip(cases, full, strict=True):
        cached.reset()
        ours.append(psnr(tiny.sample(cached, case.tokens, case.noise, STEPS, solver=solver), reference))
        contexts = cached.report().contexts.values()
        computed.append(statistics.mean(context.computed for context in contexts))
        plain = tiny.sample(cached.original, case.tokens, case.noise, round(computed[-1]), solver=solver)
        fewer.append(psnr(plain, reference))
    gains = [a - b for a, b in zip(ours, fewer, strict=True)]
    return {
        "solver": solver,
        "computed": statistics.mean(computed),
        "psnr": statistics.mean(ours),
        "fewer_steps": statistics.mean(fewer),
        "gain": statistics.mean(gains),
        "interval": 1.96 * statistics.stdev(gains) / math.sqrt(len(gains)),
    }


def main() -> None:
    """Measure, print a table, write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--first", type=int, default=6000, help="first seed (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=20)
    args = parser.parse_args()
    cases = [Case.of(seed, 1) for seed in range(args.first, args.first + args.seeds)]
    cached, rows = bw.transform(tiny.load()), []
    for solver in ("euler", "unipc"):
        full = [tiny.sample(cached.original, case.tokens, case.noise, STEPS, solver=solver) for case in cases]
        for name, config in tqdm(SETTINGS.items(), desc=solver, mininterval=10):
            rows.append({"settings": name, **measure(cached, config, cases, solver, full)})
    if args.out:
        seeds = [case.seed for case in cases]
        write_record(args.out, {"steps": STEPS, "seeds": seeds, "versions": {"torch": torch.__version__}, "rows": rows})
    print("\n| solver | settings | computed | PSNR | fewer steps | gain |\n|---|---|---|---|---|---|")
    for row in rows:
        numbers = f"{row['computed']:.1f} | {row['psnr']:.1f} dB | {row['fewer_steps']:.1f} dB | {row['gain']:+.1f} ± {row['interval']:.1f}"
        print(f"| {row['solver']} | {row['settings']} | {numbers} |")


if __name__ == "__main__":
    main()
