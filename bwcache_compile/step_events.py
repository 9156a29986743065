"""What callbacks are told after each step, and who is told. Needs no torch."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

from bwcache_compile.report import RawStep, mean_change
from bwcache_compile.stepping import Advance, Cursor


@dataclasses.dataclass(frozen=True)
class StepEvent:
    """One step of one context, after it has succeeded.

    Attributes:
        context: Name of the context, as in `report()`.
        step: Index of the step.
        num_steps: Steps of the generation, if known.
        computed: False if it reused; with a guard per block, whether any block computed.
        reason: Why it computed or reused.
        indicator: Mean relative change of the measured blocks; None where nothing was measured or there was nothing to compare with.
        entered: When the call began, in seconds of `time.perf_counter`.
        seconds: How long the call took on the host. A device may still be computing then. Events are compared without times.
    """

    context: str
    step: int
    num_steps: int | None
    computed: bool
    reason: str
    indicator: float | None
    entered: float = dataclasses.field(compare=False)
    seconds: float = dataclasses.field(compare=False)


def step_event(
    context: str,
    entered: float,
    num_steps: int | None,
    advance: Advance,
    before: Cursor,
    record: RawStep,
    events: Sequence[str],
    in_graph: bool,
) -> StepEvent:
    """Describe a step. Reads the indicator, and with the guard in the graph the decision, from the device.

    Args:
        context: Name of the context.
        entered: When the call began, in seconds of `time.perf_counter`.
        num_steps: Steps of the generation, if known.
        advance: What the call was.
        before: The cursor on which the step ran.
        record: What the step did.
        events: What happened to the cache.
        in_graph: Whether the guard is in the graph.
    """
    seconds = time.perf_counter() - entered  # before anything is read from the device
    flags = record.flags
    computed = any(flags)
    measured = computed and not record.fresh and record.change is not None
    indicator = mean_change(record.change, flags) if measured else None
    reason = _reason(advance, before, events, computed, in_graph)
    return StepEvent(context, record.step, num_steps, computed, reason, indicator, entered, seconds)


def _reason(advance: Advance, before: Cursor, events: Sequence[str], computed: bool, in_graph: bool) -> str:
    """Say why a step computed or reused."""
    if advance.began:
        return f"a new generation began: {advance.began}"
    if before.computed_at < 0:
        return events[-1] if events else "nothing is cached"
    if in_graph:
        return "decided in the graph"
    if not computed:
        return f"step {before.computed_at} allowed reuse up to step {before.reuse_until}"
    if before.reuse_until > before.computed_at:
        return f"the reuse that step {before.computed_at} allowed ended at step {before.reuse_until}"
    return f"step {before.computed_at} allowed no reuse"


class Handle:
    """A registered callback."""

    def __init__(self, listeners: Listeners) -> None:
        """Belong to a table of callbacks."""
        self._listeners = listeners

    def remove(self) -> None:
        """Call the callback no more. Removing it twice does nothing."""
        self._listeners.pop(self, None)


class Listeners(dict[Handle, Callable[[StepEvent], None]]):
    """Callbacks by handle, in the order in which they were added."""

    def add(self, callback: Callable[[StepEvent], None]) -> Handle:
        """Register a callback."""
        handle = Handle(self)
        self[handle] = callback
        return handle

    def tell(self, event: StepEvent) -> None:
        """Call every callback. Called after the step has succeeded and its context is free again."""
        for callback in tuple(self.values()):
            callback(event)
