"""Calibrate the bundled video model on two prompts, then generate others: what it gains and what it costs.

50 denoising steps with guidance, under Euler and under UniPC. Each table compares with the uncached run of the same noise: the
calibrated model, plain runs with as many steps and with as much time, and the paper's schedule with its default settings.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent / "tiny_video_dit"))

import data
import model as tiny
import quality

import bwcache_compile as bw


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way of running: a module, the steps that it samples, and the settings that it is given first."""

    module: Any
    steps: int
    config: bw.CacheConfig | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """Clips of one way of running, float32[B, 3, F, H, W], the steps that it computed, and the seconds of each generation."""

    clips: Tensor
    computed: int
    seconds: list[float]

    @property
    def fastest(self) -> float:
        """Seconds of the fastest generation."""
        return min(self.seconds)


def prompts(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw conditions and noise."""
    return data.encode(data.draw_attributes(count, torch.Generator().manual_seed(seed))), tiny.draw_noise(count, seed)


def computed_steps(contestant: Contestant) -> int:
    """Return how many steps the last generation computed, the mean over its contexts."""
    if contestant.config is None:
        return contestant.steps
    return round(statistics.mean(context.computed for context in contestant.module.report().contexts.values()))


def race(contestants: dict[str, Contestant], tokens: Tensor, noise: Tensor, solver: tiny.Solver, repeats: int) -> dict[str, Run]:
    """Generate the same clips with each contestant in turn, so that noise hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    runs: dict[str, tuple[Tensor, int]] = {}
    with tqdm(total=sum(c.steps for c in contestants.values()) * repeats, unit="step", mininterval=1) as bar:
        for _ in range(repeats):
            for name, contestant in contestants.items():
                bar.set_description(f"{solver}, {name:24}")
                if contestant.config is not None:
                    contestant.module.configure(contestant.config)
                began = time.perf_counter()
                clips = tiny.sample(contestant.module, tokens, noise, contestant.steps, on_step=bar.update, solver=solver)
                seconds[name].append(time.perf_counter() - began)
                runs[name] = clips, computed_steps(contestant)
    return {name: Run(*runs[name], seconds[name]) for name in contestants}


def compare(cached: bw.CachedModel, original: Any, solver: tiny.Solver, args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Run]]:
    """Calibrate, race, and print a table; return what it says, and the runs."""
    calibration = prompts(2, args.calibrate_on)
    plan = bw.calibrate(cached, lambda model: tiny.sample(model, *calibration, args.steps, solver=solver), budgets=args.budgets)
    print(f"\n{plan}\n")

    contestants = {"every step": Contestant(original, args.steps)}
    for entry in plan.entries:
        contestants[f"calibrated, {entry.computed}"] = Contestant(cached, args.steps, plan.at(entry.budget))
        contestants[f"plain, {entry.computed} steps"] = Contestant(original, entry.computed)
    paper = bw.CacheConfig.paper(num_steps=args.steps)
    contestants["paper's default"] = Contestant(bw.transform(original, paper), args.steps, paper)
    tokens, noise = prompts(args.clips, args.seed)
    runs = race(contestants, tokens, noise, solver, args.repeats)

    full = runs["every step"]
    equal_time = {}
    for entry in plan.entries:  # as many plain steps as take the time of the calibrated run
        steps = max(1, round(args.steps * runs[f"calibrated, {entry.computed}"].fastest / full.fastest))
        if steps not in (e.computed for e in plan.entries):
            equal_time[f"plain, {steps} steps (the time of calibrated, {entry.computed})"] = Contestant(original, steps)
    runs |= race(equal_time, tokens, noise, solver, 1) if equal_time else {}

    rows = {}
    print(f"\n{solver:44}{'computed':>9}{'speed-up':>10}{'PSNR':>9}{'SSIM':>8}   against every step of {args.steps} computed")
    for name, run in runs.items():
        if run is full:
            continue
        close = quality.closeness(run.clips, full.clips)
        rows[name] = {"computed": run.computed, "speed_up": full.fastest / run.fastest, **dataclasses.asdict(close)}
        print(f"{name:44}{run.computed:9}{full.fastest / run.fastest:9.2f}x{close.psnr:6.1f} dB{close.ssim:8.3f}")
    held = sum(context.state_bytes for context in cached.report().contexts.values())
    print(f"cache memory: {held / 2**20:.2f} MiB for {len(cached.report().contexts)} contexts\n")
    return {"rows": rows, "cost": plan.provenance.cost, "plan": str(plan), "state_bytes": held}, runs


def compiled_speed_up(cached: bw.CachedModel, original: Any, config: bw.CacheConfig, args: argparse.Namespace) -> float:
    """Return the speed-up of the calibrated model where both are compiled with torch.compile."""
    cached.configure(config)
    contestants = {"compiled": Contestant(torch.compile(original), args.steps), "cached": Contestant(torch.compile(cached), args.steps)}
    runs = race(contestants, *prompts(args.clips, args.seed), "euler", args.repeats)
    return runs["compiled"].fastest / runs["cached"].fastest


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.4, 0.28], help="shares of computed steps (default %(default)s)")
    parser.add_argument("--solvers", nargs="+", choices=["euler", "unipc"], default=["euler", "unipc"])
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibrate-on", type=int, default=3000, help="seed of the prompts that are calibrated on (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="generations per way of running; the fastest counts")
    parser.add_argument("--compile", action="store_true", help="measure under torch.compile too (a minute or two)")
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    original = tiny.load()
    tokens, noise = prompts(args.clips, args.seed)
    example = (tiny.with_coordinates(noise), torch.ones(args.clips), tokens)
    cached = bw.transform(original, example_args=example, example_kwargs={"return_dict": False})
    print(f"found {len(cached.plan.blocks)} blocks in {type(original).__name__}\n{cached.plan}\n")

    result: dict[str, Any] = {
        "command": " ".join(["python examples/quickstart.py", *sys.argv[1:]]),
        "steps": args.steps,
        "clips": args.clips,
        "seed": args.seed,
        "calibrated_on": args.calibrate_on,
    }
    for solver in args.solvers:
        result[solver], runs = compare(cached, original, solver, args)
        names = list(runs)
        clips = {"every step": runs[names[0]].clips, names[1]: runs[names[1]].clips, names[2]: runs[names[2]].clips}
        quality.contact_sheet(clips, args.out / f"contact_sheet_{solver}.png")
        quality.animation(clips, args.out / f"side_by_side_{solver}.gif")
        print(f"every step, calibrated and fewer steps, row by row: {args.out / f'contact_sheet_{solver}.png'}")
    if args.compile:
        result["compiled_speed_up"] = compiled_speed_up(cached, original, cached.cache_config, args)
        print(f"under torch.compile, both: {result['compiled_speed_up']:.2f}x")
    (args.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
