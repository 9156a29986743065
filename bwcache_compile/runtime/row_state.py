"""The cache of one sample as a value: to save it to host memory, and to move it to another cached model."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

import torch

from bwcache_compile.contexts import ContextTable
from bwcache_compile.errors import ConfigError, StateError
from bwcache_compile.report import RawStep
from bwcache_compile.runtime.context import ModelContext
from bwcache_compile.runtime.signature import CallKey
from bwcache_compile.runtime.state import CacheState
from bwcache_compile.stepping import StepInfo, Tracker


@dataclasses.dataclass(frozen=True)
class RowState:
    """Everything that one sample of a batch carries from step to step. Made by `CachedModel.row_state`.

    A value: saving, moving and stepping leave it as it is. It can be pickled.

    Attributes:
        state: The cache; None where the generation has ended.
        tracker: Which step the next call is.
        layout: What the cache consists of.
        key: What the last call looked like.
        model: Class, dtype and weights of the model that made it.
        records: What each step of its generation did.
        events: What happened besides.
        began: Why its generation began.
    """

    state: CacheState | None
    tracker: Tracker
    layout: Hashable
    key: CallKey | None
    model: str
    records: tuple[RawStep, ...]
    events: tuple[str, ...]
    began: str

    @property
    def next_step(self) -> int:
        """Index of the next step."""
        return self.tracker.next_step

    @property
    def bytes(self) -> int:
        """Bytes that its tensors hold."""
        return 0 if self.state is None else self.state.bytes

    def to(self, device: torch.device | str) -> RowState:
        """Return the same state with its tensors on a device."""
        if self.state is None:
            return self
        return dataclasses.replace(self, state=self.state.to(device))

    def cpu(self) -> RowState:
        """Return the same state in host memory."""
        return self.to("cpu")


class RowStore:
    """Keeps states of samples in host memory, such as those of requests that wait, within a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        """Hold nothing yet.

        Raises:
            ConfigError: The number is no int >= 1.
        """
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
            raise ConfigError(f"max_bytes is {max_bytes!r}; it must be an int >= 1.")
        self.max_bytes = max_bytes
        self._held: dict[str, RowState] = {}

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, name: str) -> bool:
        return name in self._held

    @property
    def bytes(self) -> int:
        """Bytes that it holds."""
        return sum(state.bytes for state in self._held.values())

    def save(self, name: str, state: RowState) -> None:
        """Keep a state under a name; one of that name is replaced.

        Raises:
            StateError: It does not fit. What was held is held still.
        """
        others = self.bytes - (self._held[name].bytes if name in self._held else 0)
        if others + state.bytes > self.max_bytes:
            raise StateError(
                f"the state of row {name!r} takes {state.bytes} bytes, and {others} of {self.max_bytes} are taken. Take states out, or"
                " allow more with RowStore(max_bytes=...)."
            )
        self._held[name] = state.cpu()

    def take(self, name: str) -> RowState:
        """Return a state and hold it no longer.

        Raises:
            StateError: There is none of that name.
        """
        if name not in self._held:
            raise StateError(f"there is no row {name!r}. Rows: {', '.join(self._held) or 'none'}.")
        return self._held.pop(name)


def read_row(contexts: ContextTable[ModelContext], info: StepInfo, model: str) -> RowState:
    """Return the state of a sample; it stays where it is.

    Raises:
        StateError: There is no such sample, or another thread is in it.
    """
    context = contexts.get(info.key)
    if context is None or not context.tracker.started:
        raise StateError(f"there is no row {info.key!r}. Rows: {', '.join(c.name for c in contexts.values()) or 'none'}.")
    if not context.lock.acquire(blocking=False):
        raise StateError(f"row {info.key!r} is in use by another thread.")
    try:
        records = tuple(context.records)
        return RowState(context.state, context.tracker, context.layout, context.key, model, records, tuple(context.events), context.began)
    finally:
        context.lock.release()


def write_row(
    contexts: ContextTable[ModelContext], info: StepInfo, row: RowState, model: str, version: tuple[int, int], device: torch.device
) -> None:
    """Let a sample of this name go on from a state.

    Raises:
        StateError: There is such a sample already, or another model made the state.
    """
    if row.model != model:
        raise StateError(f"this state was made by {row.model}, and the model is {model}. Steps would reuse what another model computed.")
    moved = row.to(device)

    def fill(context: ModelContext) -> None:
        context.state, context.tracker, context.layout, context.key = moved.state, moved.tracker, moved.layout, moved.key
        context.version, context.state_bytes = version, moved.bytes
        context.records, context.events, context.began = list(moved.records), list(moved.events), moved.began

    contexts.put(info, fill, row.tracker.run)
