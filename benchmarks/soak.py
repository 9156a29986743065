"""Thousands of generations in one process: does memory stay flat, are programs bounded, is every output right?

    python benchmarks/soak.py --generations 5000 --out benchmarks/results/soak.json

Generations of eight contexts take turns step by step, at mixed sizes, in rounds of mixed settings (three masks, the schedule, a
table of weights), and one in eight is broken off. Every hundredth generation is compared afterwards, bit for bit, with the same generation
of a cached model that has run nothing else. Memory is the resident size of the process, read after every fifth round.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import bwcache_compile as bw
from benchmarks.record import write_record
from tests.models import OneStream, noise

CONTEXTS = 8
STEPS = 8
SIZES = (1, 2, 3)
SETTINGS: tuple[dict[str, Any], ...] = (
    {"policy": "static", "steps_mask": (0, 0, 1, 0, 1, 1, 0, 0)},
    {"policy": "static", "steps_mask": (0, 1, 1, 1, 0, 1, 1, 0)},
    {"policy": "static", "steps_mask": (0, 0, 0, 1, 0, 1, 0, 1), "weights": (None, None, None, (1.5, -0.5), *(None,) * 4)},
    {"policy": "schedule", "threshold": 1.0, "reuse_interval": 2, "num_steps": STEPS, "steps_mask": None, "weights": None},
)
"""Each round takes the next one. They share their graphs' settings but for the policy."""


def settings_of(number: int) -> dict[str, Any]:
    """Return the settings of a round."""
    base: dict[str, Any] = {"weights": None, "num_steps": None}
    return {**base, **SETTINGS[number % len(SETTINGS)]}


def inputs(seed: int, batch: int, step: int) -> tuple[Tensor, Tensor]:
    """Return the inputs of a step of a generation."""
    return noise(f"x{seed}", step, batch, 6, 4), torch.full((batch,), 1 - step / STEPS)


def resident() -> int:
    """Return the bytes of memory that this process has."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def together(cached: Any, begun: list[tuple[str, int, int, int]]) -> dict[str, list[Tensor]]:
    """Run generations side by side, a step of each in turn; each is a context, a seed, a batch and how many steps it runs."""
    made: dict[str, list[Tensor]] = {context: [] for context, *_ in begun}
    for step in range(STEPS):
        for context, seed, batch, steps in begun:
            if step < steps:
                with torch.no_grad(), cached.cache_context(context):
                    made[context].append(cached(*inputs(seed, batch, step)))
    return made


def soak(generations: int, capture: Literal["whole", "region", "opaque"], every: int = 100) -> dict[str, Any]:
    """Run generations; return how memory went and whether any output was wrong."""
    model = OneStream(depth=4).eval().requires_grad_(False)
    cached: Any = bw.transform(model, reuse="taylor", capture=capture, **settings_of(0))
    drawn, done, wrong = random.Random(0), 0, 0
    kept: list[tuple[dict[str, Any], tuple[str, int, int, int], list[Tensor]]] = []
    memory: list[int] = []
    start = time.perf_counter()
    number = 0
    while done < generations:
        settings = settings_of(number)
        cached.configure(**settings)
        begun = []
        for place in range(CONTEXTS):
            broken_off = drawn.random() < 1 / 8
            steps = drawn.randrange(1, STEPS) if broken_off else STEPS
            begun.append((f"context {place}", drawn.randrange(10**6), drawn.choice(SIZES), steps))
        made = together(cached, begun)
        if done // every != (done + CONTEXTS) // every:
            one = begun[number % CONTEXTS]
            kept.append((settings, one, made[one[0]]))
        done, number = done + CONTEXTS, number + 1
        if number % 5 == 0:
            memory.append(resident())
    seconds = time.perf_counter() - start
    for settings, one, made_then in kept:  # at the end: FX keeps the text of every graph that was ever captured
        alone = bw.transform(model, reuse="taylor", capture=capture, **settings)
        wrong += not all(map(torch.equal, made_then, together(alone, [one])[one[0]]))
        alone.close()
    half = memory[len(memory) // 4 : len(memory) // 2]
    last = memory[-len(memory) // 4 :]
    return {
        "capture": capture,
        "generations": done,
        "seconds": round(seconds, 1),
        "compared": len(kept),
        "wrong": wrong,
        "captures": cached.report().captures,
        "programs": len(cached.cached_programs) if capture == "whole" else None,
        "resident MiB": {
            "second quarter, median": round(statistics.median(half) / 2**20, 1),
            "last quarter, median": round(statistics.median(last) / 2**20, 1),
            "each tenth": [round(m / 2**20, 1) for m in memory[:: max(1, len(memory) // 10)]],
        },
    }


def main() -> None:
    """Run the soak for each way of capturing, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generations", type=int, default=5000)
    parser.add_argument("--captures", nargs="+", default=["whole", "region", "opaque"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", bw.CacheWarning)
    record = {"command": f"python benchmarks/soak.py --generations {options.generations}", "torch": torch.__version__}
    record["runs"] = [soak(options.generations, capture) for capture in options.captures]
    for run in record["runs"]:
        print(run)
    if options.out is not None:
        write_record(options.out, record)


if __name__ == "__main__":
    main()
