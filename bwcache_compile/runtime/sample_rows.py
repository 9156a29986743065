"""The samples of one call that decide by themselves, and the graphs that they run in."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

from torch import Tensor

from bwcache_compile.config import CacheConfig
from bwcache_compile.runtime.context import ModelContext
from bwcache_compile.runtime.match import ProgramMatch
from bwcache_compile.runtime.sample_batch import BatchCall
from bwcache_compile.runtime.state import CacheState
from bwcache_compile.step_events import StepEvent
from bwcache_compile.stepping import Advance, cache_cleared


@dataclasses.dataclass
class Row:
    """One sample of a call.

    Attributes:
        context: Its stream of calls, locked until the call ends.
        advance: Which step of which generation it is.
        num_steps: Steps of the generation, if known.
        state: What it runs on; None where nothing is cached.
        events: What a report says of it.
        renumbered: Whether a Python number changed since the last call.
        following: Its state afterwards.
        change: What was measured, float32[blocks].
    """

    context: ModelContext
    advance: Advance
    num_steps: int | None
    state: CacheState | None
    events: list[str]
    renumbered: bool
    following: CacheState | None = None
    change: Tensor | None = None

    @property
    def reuses(self) -> bool:
        """Whether its step reuses."""
        return self.state is not None and self.state.reuses_next

    def drop(self, why: str) -> None:
        """Run on an empty cache."""
        self.state = None
        self.events.append(cache_cleared(why, self.advance.step))


@dataclasses.dataclass
class Part:
    """Samples of a call that run in one graph.

    Attributes:
        kind: Names the graph.
        rows: Which samples, by position.
        size: The batch size at which they run; what is more than their number repeats the first.
        match: The program.
        layout: What each of them keeps.
        operands: Inputs of the graph.
        first: What the graph returned already, where it was just checked on these samples.
    """

    kind: str
    rows: list[int]
    size: int
    match: ProgramMatch
    layout: Hashable
    operands: list[Any] = dataclasses.field(default_factory=list)
    first: list[Any] | None = None


@dataclasses.dataclass
class BatchStep:
    """A call on its way."""

    call: BatchCall
    config: CacheConfig
    rows: list[Row]
    parts: list[Part]
    told: list[StepEvent] = dataclasses.field(default_factory=list)


def row_layout(match: ProgramMatch, size: int) -> Hashable:
    """Return what a program keeps for one sample; states of equal layouts can be exchanged."""
    slots = []
    for slot, tensor_shape in zip(match.runnable.slots, match.slot_shapes, strict=True):
        slots.append((slot.name, slot.role, slot.dtype, (tensor_shape[0] // size, *tensor_shape[1:])))
    plan = match.runnable.plan
    return tuple(block.name for block in plan.blocks), plan.time_input, tuple(slots)
