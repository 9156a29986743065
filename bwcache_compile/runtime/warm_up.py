"""Run graphs so that whatever compiles does so."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bwcache_compile.runtime.frames import left_out
from bwcache_compile.runtime.runnable import RunnableProgram
from bwcache_compile.runtime.state import CacheState
from bwcache_compile.stepping import Cursor


@left_out
def run_all(runnable: RunnableProgram, flat: Sequence[Any], fresh: CacheState, parameters: tuple[Tensor, ...]) -> None:
    """Run every graph on a fresh state and drop what it returns; an outer torch.compile compiles them here.

    Where CUDA graphs are replayed each graph runs twice: the first run compiles, the second one records.
    `parameters` are what all graphs take of the settings.
    """
    with torch.no_grad():
        for state in (fresh, dataclasses.replace(fresh, cursor=Cursor(step=1, computed_at=0, reuse_until=1))):
            kind = runnable.kind(state)
            for _ in range(2 if runnable.replays() else 1):
                runnable.graph(kind)(*runnable.operands(flat, state, runnable.taken(kind, parameters)))
