"""What reuse costs in quality on the bundled model, next to the honest rivals. Nothing here is timed.

    python benchmarks/quality.py --out benchmarks/results/quality.json

For each setting: steps computed, and PSNR / SSIM against the uncached run of the same noise, over several seeds. The
rivals: a plain run with as many steps as were computed, and diffusers' FirstBlockCache on the same weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "tiny_video_dit"))

import data
import model as tiny
import quality

import bwcache_compile as bw
from benchmarks.record import write_record

STEPS = 50
LATE = {"threshold": 0.065, "warmup_steps": 4}
"""Past the peak of the left arm, where the indicator falls steeply: all contexts trigger within a step or two."""
SETTINGS: list[dict[str, Any]] = [
    *({"threshold": threshold, "reuse_interval": interval} for threshold in (0.03, 0.04, 0.15) for interval in (3, 5)),
    *(LATE | {"reuse_interval": interval} for interval in (3, 5)),
    *({"threshold": threshold, "reuse_interval": 3, "reuse": "residual"} for threshold in (0.04, 0.15)),
    *({"threshold": threshold, "reuse_interval": i, "reuse": "taylor"} for threshold in (0.04, 0.15) for i in (3, 5)),
    *(LATE | {"reuse_interval": interval, "reuse": "taylor"} for interval in (3, 5)),
    *({"threshold": threshold, "reuse_interval": 3, "decide": "joint"} for threshold in (0.03, 0.04)),
    *({"threshold": threshold, "reuse_interval": 3, "reuse": "taylor", "decide": "joint"} for threshold in (0.03, 0.04)),
    {"threshold": 0.03, "reuse_interval": 3, "reuse": "taylor"},
]


def first_block_cache(threshold: float, tokens: Any, noise: Any) -> tuple[Any, float]:
    """Run diffusers' FirstBlockCache; return the clips and how many steps ran every block, per context."""
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    model = tiny.load()
    counts = [0]
    # a part of a late block: the hook skips the block's own forward, and its hooks run all the same
    model.blocks[-2].ffn.register_forward_hook(lambda *_: counts.__setitem__(0, counts[0] + 1))
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=threshold))
    return tiny.sample(model, tokens, noise, STEPS), counts[0] / 2


def summarise(rows: list[dict[str, float]]) -> dict[str, float]:
    """Average the rows of several seeds."""
    return {name: statistics.mean(row[name] for row in rows) for name in rows[0]}


def markdown(result: dict[str, Any]) -> str:
    """Lay the result out as the table of `examples/tiny_video_dit/README.md`."""
    lines = ["| threshold | warm-up | R | reuse | trigger | computed | against the full run | as many plain steps |", "|---" * 8 + "|"]
    for kind in ("bwcache", "first_block_cache"):
        for row in result[kind]:
            way = row.get("reuse", "output") + (", joint" if "decide" in row else "") if kind == "bwcache" else "FirstBlockCache"
            trigger = f"{row['trigger']:.1f}" if "trigger" in row else ""
            cells = [row["threshold"], row.get("warmup_steps", ""), row.get("reuse_interval", ""), way, trigger, f"{row['computed']:.1f}"]
            cells += [f"{row[f'{at}psnr']:.1f} dB / {row[f'{at}ssim']:.3f}" for at in ("", "fewer_")]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table, write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--clips", type=int, default=2)
    args = parser.parse_args()

    original = tiny.load()
    cases = []
    for seed in range(args.seeds):
        tokens = data.encode(data.draw_attributes(args.clips, torch.Generator().manual_seed(1000 + seed)))
        noise = tiny.draw_noise(args.clips, 1000 + seed)
        cases.append((tokens, noise, tiny.sample(original, tokens, noise, STEPS)))

    plain: dict[tuple[int, int], quality.Closeness] = {}

    def fewer(seed: int, steps: int) -> quality.Closeness:
        if (seed, steps) not in plain:
            tokens, noise, full = cases[seed]
            plain[seed, steps] = quality.closeness(tiny.sample(original, tokens, noise, steps), full)
        return plain[seed, steps]

    curve = bw.transform(original, bw.CacheConfig.paper(threshold=0, num_steps=STEPS))
    tiny.sample(curve, cases[0][0], cases[0][1], STEPS)
    result: dict[str, Any] = {
        "steps": STEPS, "seeds": args.seeds, "clips": args.clips, "versions": {"torch": torch.__version__},
        "indicator": {name: [r.indicator for r in context.steps] for name, context in curve.report().contexts.items()},
        "bwcache": [], "first_block_cache": [],
    }  # fmt: skip
    for setting in tqdm(SETTINGS, desc="settings"):
        cached = bw.transform(original, bw.CacheConfig(num_steps=STEPS, **setting))
        rows = []
        for seed, (tokens, noise, full) in enumerate(cases):
            cached.reset()
            near = quality.closeness(tiny.sample(cached, tokens, noise, STEPS), full)
            contexts = cached.report().contexts.values()
            computed = statistics.mean(context.computed for context in contexts)
            triggers = [next((r.step - 1 for r in context.steps if not r.computed), STEPS) for context in contexts]
            few = fewer(seed, round(computed))
            rows.append(
                {"computed": computed, "trigger": statistics.mean(triggers), **dataclasses.asdict(near),
                 "fewer_psnr": few.psnr, "fewer_ssim": few.ssim}
            )  # fmt: skip
        result["bwcache"].append(setting | summarise(rows))
    for threshold in tqdm((0.03, 0.05, 0.08, 0.12), desc="FirstBlockCache"):
        rows = []
        for seed, (tokens, noise, full) in enumerate(cases):
            clips, computed = first_block_cache(threshold, tokens, noise)
            few = fewer(seed, max(1, round(computed)))
            rows.append(
                {"computed": computed, **dataclasses.asdict(quality.closeness(clips, full)), "fewer_psnr": few.psnr, "fewer_ssim": few.ssim}
            )
        result["first_block_cache"].append({"threshold": threshold} | summarise(rows))

    print(markdown(result))
    if args.out:
        write_record(args.out, result)


if __name__ == "__main__":
    main()
