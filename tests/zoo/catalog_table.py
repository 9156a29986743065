"""Print the section of `docs/zoo.md` that lists every transformer class of diffusers 0.42."""

from __future__ import annotations

import warnings

import torch

import bwcache_compile as bw
from tests.zoo.catalog import CATALOG, LEFT_OUT
from tests.zoo.catalog_entry import CatalogEntry, found_blocks

HEAD = """\
## Every transformer of diffusers 0.42

What `bw.transform(model, capture="auto", example_kwargs=...)` makes of a tiny configuration of each class
(`tests/zoo/catalog.py`). `tests/test_catalog.py` checks that four computed steps equal the model bit for bit, and that a
reused step is another one and is finite. `python -m tests.zoo.table --catalog` prints this section. A class of which more
than one configuration was tried has a row for each.

| class | capture | blocks | why not whole |
|---|---|---|---|"""


def _why(caught: list[warnings.WarningMessage]) -> str:
    """Return what the warning of `capture="auto"` says first of the whole model: two lines of it."""
    text = next(str(warning.message) for warning in caught if " is captured as " in str(warning.message))
    lines = [line.strip() for line in text.partition("\n  whole: ")[2].partition("\n  region: ")[0].splitlines()]
    return " ".join(lines[:2]).replace("|", "\\|")


def _row(entry: CatalogEntry) -> str:
    model = entry.make()
    with torch.no_grad():
        model(**entry.inputs(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cached = bw.transform(model, capture="auto", threshold=0, num_steps=4, example_kwargs=entry.call(0))
    kind = type(cached).__name__.removesuffix("Model").lower().replace("cached", "whole")
    stacks = [name.rpartition(".")[0] or name for name in found_blocks(cached)]
    counted = ", ".join(f"`{stack}` {stacks.count(stack)}" for stack in dict.fromkeys(stacks))
    return f"| {entry.model} | {kind} | {counted} | {'' if kind == 'whole' else _why(caught)} |"


def print_catalog() -> None:
    """Print the section."""
    print(HEAD)
    for entry in sorted(CATALOG.values(), key=lambda entry: entry.model):
        print(_row(entry), flush=True)
    print("\nLeft out:\n")
    for name, reason in LEFT_OUT.items():
        print(f"- {name}: {reason}.")
