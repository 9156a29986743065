"""One stream of calls: its state, its history, and where it is."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

from bwcache_compile.runtime.report import ContextReport, StepRecord
from bwcache_compile.runtime.state import CacheState


@dataclasses.dataclass(frozen=True)
class Moment:
    """What the caller said about a call: the context's name, the step and the number of steps, where known."""

    name: str
    step_index: int | None = None
    num_steps: int | None = None


class Context:
    """Mutable holder of one context's state; only the thread that has `lock` touches it."""

    def __init__(self, name: str) -> None:
        """Start without a state."""
        self.name = name
        self.lock = threading.Lock()
        self.state: CacheState | None = None
        self.owner: Any = None
        self.weights: int | None = None
        self.inputs: list[Any] = []
        self.records: list[StepRecord] = []
        self.events: list[str] = []

    def start(self) -> None:
        """Begin a new generation: the history of the last one goes."""
        self.records, self.events, self.weights = [], [], None

    def report(self) -> ContextReport:
        """Return the current generation as a value."""
        held = self.state.bytes if self.state else 0
        return ContextReport(self.name, tuple(self.records), tuple(self.events), held)
