"""Print the table of `docs/zoo.md`: `python -m tests.zoo.table > docs/zoo.md`. Takes some minutes."""

from __future__ import annotations

import time
import warnings

import torch

import bwcache_compile as bw
from bwcache_compile import passes
from bwcache_compile.capture import capture, flat_outputs
from bwcache_compile.runtime import Toolchain
from tests.zoo import REFUSED, ZOO, Entry

HEAD = """\
# The zoo

Tiny configurations of diffusers model classes, built without a hub. For each, `tests/test_zoo.py` checks that four
computed steps equal the model bit for bit, that the blocks are those of the main stacks, and that every way of reuse
that is not refused equals an oracle in eager Python. This table is what
`python -m tests.zoo.table` prints: seconds are CPU seconds of one core for capture and search at this tiny size; "refused"
is a `ConfigError` that says which value no input is proved to continue.

| class | blocks | main stacks | threshold 0 | `output` | `residual` | `taylor` | seconds |
|---|---|---|---|---|---|---|---|"""


def _row(entry: Entry) -> str:
    model = entry.make()
    began = time.process_time()
    captured = capture(model, (), entry.call(0))
    toolchain = Toolchain(capture=lambda *_: captured.fresh(), build=passes.build, explain=passes.explain)
    cached = bw.CachedModel(model, bw.CacheConfig(threshold=0, num_steps=4), toolchain)
    cached.prepare((), entry.call(0))
    seconds = time.process_time() - began
    equal = True
    for step in range(4):
        with torch.no_grad():
            actual, expected = flat_outputs(cached(**entry.inputs(step))), flat_outputs(model(**entry.inputs(step)))
        equal &= all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    ways = []
    for reuse in ("output", "residual", "taylor"):
        try:
            passes.build(captured.fresh(), bw.CacheConfig(reuse=reuse, num_steps=4))
            ways.append("yes")
        except bw.ConfigError:
            ways.append("refused")
    stacks = [block.stack for block in cached.plan.blocks]
    counted = ", ".join(f"`{stack}` {stacks.count(stack)}" for stack in dict.fromkeys(stacks)) + (" in turn" if entry.in_turn else "")
    columns = [entry.model, str(len(cached.plan.blocks)), counted, "equal" if equal else "DIFFERS", *ways, f"{seconds:.1f}"]
    return f"| {' | '.join(columns)} |"


def _refusal(entry: Entry) -> str:
    try:
        bw.transform(entry.make(), example_kwargs=entry.call(0))
    except (bw.CaptureError, bw.UnsupportedGraphError) as error:
        return f"- {entry.model}: `{type(error).__name__}`, {entry.never_captured}"
    return f"- {entry.model}: NOT REFUSED"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(HEAD)
    for entry in ZOO.values():
        print(_row(entry), flush=True)
    print("\nRefused, with the evidence that the error gives:\n")
    for entry in REFUSED.values():
        print(_refusal(entry), flush=True)
