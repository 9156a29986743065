"""Print `docs/zoo.md`: `python -m tests.zoo.table > docs/zoo.md`. Takes some minutes; `--catalog` prints its last section alone."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
import warnings
from typing import get_args

import torch
from torch import nn

import bwcache_compile as bw
from bwcache_compile import passes
from bwcache_compile.ir.compare import flat_outputs
from bwcache_compile.runtime import Toolchain
from tests.zoo import REFUSED, ZOO, Entry
from tests.zoo.catalog_table import print_catalog

HEAD = """\
# The zoo

Tiny configurations of diffusers model classes, built without a hub. For each, `tests/test_zoo.py` checks that four
computed steps equal the model bit for bit, that the blocks are those of the main stacks, and that every way of reuse
equals an oracle in eager Python, and that the two guards agree bit for bit over four steps, two of
them reused. This table is what `python -m tests.zoo.table` prints: seconds are CPU seconds of one core for capture and
search at this tiny size; "refused" is a `ConfigError` that says which value no input is proved to continue.

| class | blocks | main stacks | threshold 0 | guards | `output` | `residual` | `taylor` | seconds |
|---|---|---|---|---|---|---|---|---|"""


def _agreement(one: nn.Module, other: nn.Module, entry: Entry, word: str) -> str:
    """Run four steps with both and compare every bit."""
    for step in range(4):
        with torch.no_grad():
            actual, expected = flat_outputs(one(**entry.inputs(step))), flat_outputs(other(**entry.inputs(step)))
        if not all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True)):
            return "DIFFER"
    return word


def _row(entry: Entry) -> str:
    model = entry.make()
    began = time.process_time()
    cached = bw.transform(model, bw.CacheConfig(threshold=0, num_steps=4), example_kwargs=entry.call(0))
    seconds = time.process_time() - began
    captured = cached.program
    toolchain = Toolchain(capture=lambda *_, **__: captured.fresh(), build=passes.build, explain=passes.explain)
    mask = bw.CacheConfig(policy="static", steps_mask=(0, 1, 0, 1))
    guards = []
    for guard in get_args(passes.Guard):
        build = functools.partial(passes.build, guard=guard)
        guards.append(bw.CachedModel(model, mask, dataclasses.replace(toolchain, build=build)))
    ways = []
    for reuse in ("output", "residual", "taylor"):
        try:
            passes.build(captured.fresh(), bw.CacheConfig(reuse=reuse, num_steps=4))
            ways.append("yes")
        except bw.ConfigError:
            ways.append("refused")
    stacks = [block.stack for block in cached.plan.blocks]
    counted = ", ".join(f"`{stack}` {stacks.count(stack)}" for stack in dict.fromkeys(stacks)) + (" in turn" if entry.in_turn else "")
    columns = [
        entry.model,
        str(len(cached.plan.blocks)),
        counted,
        _agreement(cached, model, entry, "equal"),
        _agreement(*guards, entry, "agree"),
        *ways,
        f"{seconds:.1f}",
    ]
    return f"| {' | '.join(columns)} |"


def _refusal(entry: Entry) -> str:
    try:
        bw.transform(entry.make(), example_kwargs=entry.call(0))
    except bw.CaptureError as error:
        return f"- {entry.model}: `{type(error).__name__}`, {entry.never_captured}"
    return f"- {entry.model}: NOT REFUSED"


def _print_zoo() -> None:
    print(HEAD)
    for entry in ZOO.values():
        print(_row(entry), flush=True)
    print("\nOmniGenTransformer2DModel replaces a buffer in every forward and has a test of its own (`tests/test_zoo.py`).")
    print("\nRefused, with the evidence that the error gives:\n")
    for entry in REFUSED.values():
        print(_refusal(entry), flush=True)
    print()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if "--catalog" not in sys.argv:
        _print_zoo()
    print_catalog()
