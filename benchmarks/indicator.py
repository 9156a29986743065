"""Whether the compact indicator triggers where the exact one does, on the bundled model. Nothing here is timed.

    python benchmarks/indicator.py --out benchmarks/results/indicator.json

Runs every seed once without reuse, with the exact indicator and compact ones beside it on the same latents, and works out from
what they measured at which step each would have triggered, for several thresholds and warm-ups: each context by itself,
and both together by the mean of their indicators.
"""

from __future__ import annotations

import argparse
import contextlib
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

import bwcache_compile as bw
from benchmarks.record import write_record

STEPS = 50
STRIDES = (32, 16)
CASES = [(threshold, warmup) for threshold in (0.03, 0.04, 0.05, 0.065, 0.15) for warmup in (0, 4)]


class Together:
    """Called like the model; lets every cached model measure the same step and returns the first one's output."""

    def __init__(self, models: list[bw.CachedModel]) -> None:
        self.models = models

    def cache_context(self, name: str, **step: Any) -> Any:
        """Enter the context in every model."""
        stack = contextlib.ExitStack()
        for model in self.models:
            stack.enter_context(model.cache_context(name, **step))
        return stack

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run every model."""
        first, *_ = [model(*args, **kwargs) for model in self.models]
        return first


def triggers_at(indicator: list[float], threshold: float, warmup: int) -> int:
    """Return the step at which a run triggers, or the number of steps; `indicator[0]` is that of step 1."""
    return next((step for step, value in enumerate(indicator, 1) if step >= max(1, warmup) and value < threshold), STEPS)


def joined(runs: list[list[float]]) -> list[list[float]]:
    """Average the two contexts of each seed, as `decide="joint"` does."""
    return [[(a + b) / 2 for a, b in zip(*pair, strict=True)] for pair in zip(runs[0::2], runs[1::2], strict=True)]


def main() -> None:
    """Measure, print a table, write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, default=20)
    args = parser.parse_args()

    original = tiny.load()
    configs = [bw.CacheConfig.paper(threshold=0, num_steps=STEPS)]
    configs += [bw.CacheConfig(threshold=0, num_steps=STEPS, indicator_tokens=stride) for stride in STRIDES]
    together = Together([bw.transform(original, config) for config in configs])
    runs: list[list[list[float]]] = [[] for _ in configs]
    for seed in tqdm(range(args.seeds), desc="seeds"):
        for model in together.models:
            model.reset()
        tokens = data.encode(data.draw_attributes(1, torch.Generator().manual_seed(seed)))
        tiny.sample(together, tokens, tiny.draw_noise(1, seed), STEPS)
        for model, found in zip(together.models, runs, strict=True):
            contexts = model.report().contexts.values()
            found += [[r.indicator for r in context.steps if r.indicator is not None] for context in contexts]
    exact, compact = runs[0], dict(zip(STRIDES, runs[1:], strict=True))
    result: dict[str, Any] = {"seeds": args.seeds, "hidden_states": {}, "error": {}, "triggers": []}
    for stride, model in zip(STRIDES, together.models[1:], strict=True):
        errors = [abs(a - b) / b for mine, theirs in zip(compact[stride], exact, strict=True) for a, b in zip(mine, theirs, strict=True)]
        result["hidden_states"][stride] = model.plan.hidden_states
        result["error"][stride] = {"mean": statistics.mean(errors), "max": max(errors)}
        held = f"{model.plan.hidden_states:.2f} hidden states"
        print(f"one token in {stride}: {held}, error mean {statistics.mean(errors):.1%} max {max(errors):.1%}")
    print("\n| decide | threshold | warm-up | exact triggers at | " + " | ".join(f"one in {s} differs" for s in STRIDES) + " |")
    print("|---" * (4 + len(STRIDES)) + "|")
    for decide, merge in (("separate", lambda run: run), ("joint", joined)):
        truth, ours = merge(exact), {stride: merge(run) for stride, run in compact.items()}
        for threshold, warmup in CASES:
            expected = [triggers_at(run, threshold, warmup) for run in truth]
            differ = {s: sum(triggers_at(run, threshold, warmup) != k for run, k in zip(ours[s], expected, strict=True)) for s in STRIDES}
            row = {"decide": decide, "threshold": threshold, "warmup": warmup, "exact": [min(expected), max(expected)], "differ": differ}
            result["triggers"].append(row | {"of": len(expected)})
            cells = [
                decide,
                threshold,
                warmup,
                f"{min(expected)} .. {max(expected)}",
                *(f"{differ[s]} of {len(expected)}" for s in STRIDES),
            ]
            print(f"| {' | '.join(map(str, cells))} |")
    if args.out:
        write_record(args.out, result)


if __name__ == "__main__":
    main()
