"""Cache the bundled video model and see what it gains and what it costs.

Runs 50 denoising steps with guidance: the model as it is, the cached model, and the model with as many steps as the
cached one computed; then the first two again under torch.compile. Prints a table and writes pictures.
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

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent / "tiny_video_dit"))

import data
import model as tiny
import quality

import bwcache_compile as bw

# What `benchmarks/quality.py` supports for this model: the table is in `examples/tiny_video_dit/README.md`.
SUPPORTED = {"threshold": 0.04, "reuse_interval": 3, "reuse": "taylor", "decide": "joint"}


@dataclasses.dataclass(frozen=True)
class Run:
    """Clips of one way of running, float32[B, 3, F, H, W], and the seconds of each generation."""

    clips: Tensor
    seconds: list[float]

    @property
    def median(self) -> float:
        """Median seconds of a generation."""
        return statistics.median(self.seconds)


def race(contestants: dict[str, tuple[Any, int]], tokens: Tensor, noise: Tensor, repeats: int) -> dict[str, Run]:
    """Generate the same clips with each contestant (a module and its steps), in turn, so that noise hits all alike.

    A first generation of each is out of the clock: it compiles what is compiled.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    clips = {}
    with tqdm(total=sum(steps for _, steps in contestants.values()) * (repeats + 1), unit="step") as bar:
        for _ in range(repeats + 1):
            for name, (module, steps) in contestants.items():
                bar.set_description(f"{name:22}")
                began = time.perf_counter()
                clips[name] = tiny.sample(module, tokens, noise, steps, on_step=bar.update)
                seconds[name].append(time.perf_counter() - began)
    return {name: Run(clips[name], seconds[name][1:]) for name in contestants}


def draw_indicator(report: Any, profile: Any, threshold: float, path: Path) -> None:
    """Plot the indicator of every step, as an uncached run measures it, and which steps the cached run reused."""
    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for name, context in profile.contexts.items():
        points = [(r.step, r.indicator) for r in context.steps if r.indicator is not None]
        axis.plot(*zip(*points, strict=True), marker=".", label=f"{name}: change per step")
    for record in next(iter(report.contexts.values())).steps:
        if not record.computed:
            axis.axvspan(record.step - 0.5, record.step + 0.5, color="0.88", linewidth=0)
    axis.axhline(threshold, color="k", linestyle="--", linewidth=0.8, label=f"threshold {threshold:g}")
    axis.set(xlabel="denoising step (grey: reused)", ylabel="relative L1 change of the blocks", ylim=(0, None))
    axis.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threshold", type=float, default=SUPPORTED["threshold"], help="reuse begins below it (default %(default)s)")
    parser.add_argument("--reuse", choices=["output", "residual", "taylor"], default=SUPPORTED["reuse"])
    parser.add_argument("--decide", choices=["separate", "joint"], default=SUPPORTED["decide"], help="whether the contexts decide together")
    parser.add_argument("--interval", type=int, default=SUPPORTED["reuse_interval"], help="steps reused between two computed ones")
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3, help="generations per way of running; the median counts")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes a minute or two)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    original = tiny.load()
    attributes = data.draw_attributes(args.clips, torch.Generator().manual_seed(args.seed))
    tokens, noise = data.encode(attributes), tiny.draw_noise(args.clips, args.seed)
    example = (tiny.with_coordinates(noise), torch.ones(args.clips), tokens)
    chosen = {"threshold": args.threshold, "reuse": args.reuse, "reuse_interval": args.interval, "decide": args.decide}
    config = bw.CacheConfig(num_steps=args.steps, **chosen)

    cached = bw.transform(original, config, example_args=example, example_kwargs={"return_dict": False})
    print(f"found {len(cached.plan.blocks)} blocks in {type(original).__name__}\n{cached.plan}\n")
    default = bw.transform(original, bw.CacheConfig(num_steps=args.steps))
    tiny.sample(cached, tokens, noise, args.steps)
    report = cached.report()
    computed = round(statistics.mean(context.computed for context in report.contexts.values()))
    contestants = {
        "baseline": (original, args.steps),
        "cached": (cached, args.steps),
        f"baseline, {computed} steps": (original, computed),
        "paper's default": (default, args.steps),
    }
    full, ours, fewer, paper = race(contestants, tokens, noise, args.repeats).values()
    paper_computed = round(statistics.mean(context.computed for context in default.report().contexts.values()))
    profiler = bw.transform(original, dataclasses.replace(config, threshold=0))
    tiny.sample(profiler, tokens, noise, args.steps)

    rows = {"eager": full.median / ours.median}
    if not args.no_compile:
        compiled = {"baseline, compiled": (torch.compile(original), args.steps), "cached, compiled": (torch.compile(cached), args.steps)}
        full_compiled, ours_compiled = race(compiled, tokens, noise, args.repeats).values()
        rows["compiled"] = full_compiled.median / ours_compiled.median

    print(f"\n{report}\n")
    print(f"{'':26}{'computed':>9}{'speed-up':>10}{'PSNR':>9}{'SSIM':>8}   against the uncached run")
    near, few, held_still = (quality.closeness(run.clips, full.clips) for run in (ours, fewer, paper))
    lines = [(f"cached, {kind}", ratio, near) for kind, ratio in rows.items()]
    lines.append((f"plain run of {computed} steps", full.median / fewer.median, few))
    lines.append(("paper's default, eager", full.median / paper.median, held_still))
    counts = [*[computed] * (len(rows) + 1), paper_computed]
    for (name, ratio, close), steps in zip(lines, counts, strict=True):
        print(f"{name:26}{steps:9}{ratio:9.2f}x{close.psnr:6.1f} dB{close.ssim:8.3f}")
    held = sum(context.state_bytes for context in report.contexts.values())
    print(f"cache memory: {held / 2**20:.2f} MiB for {len(report.contexts)} contexts, {cached.plan.hidden_states:.2f} hidden states each")

    clips = {"baseline": full.clips, "cached": ours.clips, "fewer steps": fewer.clips}
    quality.contact_sheet(clips, args.out / "contact_sheet.png")
    quality.animation(clips, args.out / "side_by_side.gif")
    draw_indicator(report, profiler.report(), args.threshold, args.out / "indicator.png")
    result = {
        "steps": args.steps, **chosen, "clips": args.clips,
        "speed_up": rows,
        "computed": {name: context.computed for name, context in report.contexts.items()},
        "cached": dataclasses.asdict(near), "fewer_steps": dataclasses.asdict(few), "paper_default": dataclasses.asdict(held_still),
        "paper_computed": paper_computed, "state_bytes": held,
    }  # fmt: skip
    (args.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nbaseline, cached and fewer steps, row by row: {args.out / 'contact_sheet.png'}, {args.out / 'side_by_side.gif'}")
    print(f"the indicator over the run: {args.out / 'indicator.png'}")


if __name__ == "__main__":
    main()
