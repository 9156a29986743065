"""Throughput of a batch whose samples decide by themselves, beside one decision for the whole batch. Ratios within one run.

    python benchmarks/samples.py --out benchmarks/results/samples.json

The batch is mixed: its samples change at paces of their own. The contestants run the same inputs over all steps and take turns, and
medians are compared. Beside its time, each has the blocks' runs that it computed (a sample at a step counts one), the samples that ran
as padding left out, and how far its outputs are from the plain model's.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import bwcache_compile as bw
from benchmarks.record import write_record

CHOICES = ("joint", "max", "per_sample")


class Block(nn.Module):
    """Attention and a feed-forward layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """Return the next hidden state."""
        q, k, v = self.qkv(self.norm(x) * (1 + temb)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


class Model(nn.Module):
    """A small diffusion transformer."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.time, self.head = nn.Linear(16, width), nn.Linear(1, width), nn.Linear(width, 16)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return what the model predicts at a step."""
        x, temb = self.patch(x), self.time(t.view(-1, 1, 1))
        for block in self.blocks:
            x = block(x, temb)
        return self.head(x)


def inputs(batch: int, tokens: int, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Return the inputs of each step; sample `i` slows down later than the one before it."""
    generator = torch.Generator().manual_seed(1)
    base, drift = torch.randn(2, batch, tokens, 16, generator=generator)
    slow = torch.linspace(0.3, 0.93, batch).view(-1, 1, 1)
    return [(base + 2 * slow**step * drift, torch.full((batch,), 1 - step / steps)) for step in range(steps)]


def run(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> tuple[float, list[Tensor]]:
    """Run one generation; return its seconds and outputs."""
    if isinstance(model, bw.CachedModel):
        model.reset()
    began = time.perf_counter()
    outputs = [model(x, t) for x, t in data]
    return time.perf_counter() - began, outputs


def computed(cached: bw.CachedModel, batch: int) -> int:
    """Return how many samples were computed, over all steps."""
    contexts = cached.report().contexts.values()
    return sum(context.computed for context in contexts) * (batch // len(contexts))


@torch.no_grad()
def main() -> None:
    """Run the contestants and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 8), ("tokens", 256), ("width", 128), ("depth", 6), ("steps", 30), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threshold", type=float, default=0.1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    model = Model(options.depth, options.width).eval().requires_grad_(False)
    data = inputs(options.batch, options.tokens, options.steps)
    config = bw.CacheConfig(policy="adaptive", threshold=options.threshold, num_steps=options.steps)
    cached: dict[str, Any] = {choice: bw.transform(model, config, batch_reduce=choice) for choice in CHOICES}
    contestants = {"plain": model, **cached}
    _, expected = run(model, data)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    results: dict[str, dict[str, Any]] = {}
    for turn in range(options.rounds + 1):  # the first one captures
        for name, contestant in contestants.items():
            taken, outputs = run(contestant, data)
            if turn:
                seconds[name].append(taken)
            worst = max(float((a - b).norm() / b.norm()) for a, b in zip(outputs, expected, strict=True))
            results[name] = {"largest_relative_error": worst}
    for name, taken in seconds.items():
        median = statistics.median(taken)
        results[name] |= {"seconds": median, "samples_steps_per_second": options.batch * options.steps / median}
        results[name]["computed"] = computed(cached[name], options.batch) if name in cached else options.batch * options.steps
        print(f"{name:11} {results[name]}")
    record = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "batch_sizes": list(cached["per_sample"].batch_sizes),
        "programs": len(cached["per_sample"].cached_programs),
        "per_sample_against_joint": results["joint"]["seconds"] / results["per_sample"]["seconds"],
        "results": results,
    }
    write_record(options.out, record)


if __name__ == "__main__":
    main()
