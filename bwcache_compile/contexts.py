"""The contexts of one model or session: found by name, entered by one thread at a time, bounded in number. Needs no torch."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import StateError
from bwcache_compile.policies import POLICIES
from bwcache_compile.report import ContextReport, RawStep, step_records
from bwcache_compile.stepping import Advance, StepInfo, Tracker

UNNAMED_PREFIX = "call_"
"""How the contexts of a step's calls begin that the caller does not name, with `CacheConfig.calls_per_step`."""

MAX_CONTEXTS = 64
"""Contexts kept at a time; the one that was called longest ago is dropped first."""


class Context:
    """One stream of calls. Only the thread that holds `lock` touches it; reports read it.

    Attributes:
        name: Its name among those of all groups.
        group: The contexts that belong to the same video.
        tracker: Which step the next call is.
        created: Ordinal of its first call.
        called: Ordinal of its last call that succeeded, among those of all contexts.
        began: Why its generation began.
        records: What each step of its generation did.
        events: What happened besides computing and reusing.
        state_bytes: Bytes that its cache takes while a generation runs.
    """

    def __init__(self, info: StepInfo, created: int) -> None:
        """Start before the first call."""
        self.name, self.group, self.created = info.key, info.group, created
        self.lock = threading.Lock()
        self.tracker, self.called = Tracker(), -1
        self.began = ""
        self.records: list[RawStep] = []
        self.events: list[str] = []
        self.state_bytes = 0

    def report(self, config: CacheConfig) -> ContextReport:
        """Return the current generation as a value, with what the policy of these settings says of it."""
        steps, explain = step_records(self.records), POLICIES[config.policy].explain
        events = (*self.events, *(explain(config, steps) if explain else ()))
        return ContextReport(self.name, steps, events, self.state_bytes, self.began)


class Scope:
    """A `cache_context` block: what the caller says about the calls inside. `unused` is called at its end if none came."""

    def __init__(self, variable: ContextVar[Scope | None], info: StepInfo, unused: Callable[[StepInfo], None] | None) -> None:
        """Say nothing before the block is entered."""
        self.info, self.called = info, False
        self._variable, self._unused = variable, unused

    def __enter__(self) -> None:
        """Begin the block."""
        self._token = self._variable.set(self)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the block, whether or not it failed."""
        self._variable.reset(self._token)
        if kind is None and not self.called and self._unused is not None:
            self._unused(self.info)


AnyContext = TypeVar("AnyContext", bound=Context)


class ContextTable(Generic[AnyContext]):
    """Contexts by name. Threads may run different ones side by side."""

    def __init__(self, make: Callable[[StepInfo, int], AnyContext]) -> None:
        """Start without a context; `make` makes one for a call, with an ordinal."""
        self._make = make
        self._lock = threading.RLock()
        self._scope: ContextVar[Scope | None] = ContextVar("bwcache_scope", default=None)
        self.clear()

    def clear(self) -> None:
        """Drop every context. A call that runs in one meanwhile is not disturbed, and leaves nothing behind."""
        with self._lock:
            self._contexts: OrderedDict[str, AnyContext] = OrderedDict()
            self._latest: dict[str, Tracker] = {}
            self._ordinals = itertools.count()
            self._unnamed = 0

    def values(self) -> list[AnyContext]:
        """Return the contexts in the order of their first calls."""
        with self._lock:
            return sorted(self._contexts.values(), key=lambda context: context.created)

    def get(self, name: str) -> AnyContext | None:
        """Return a context by name."""
        with self._lock:
            return self._contexts.get(name)

    def drop(self, key: str) -> None:
        """Forget a context: its cache is freed, and its next call begins a new generation.

        Raises:
            StateError: There is none of that name, or another thread is in it.
        """
        with self._lock:
            context = self._contexts.get(key)
            if context is None:
                raise StateError(f"there is no context {key!r}. Contexts: {', '.join(self._contexts) or 'none'}.")
            if context.lock.locked():
                raise StateError(f"context {key!r} is in use by another thread and cannot be dropped now.")
            del self._contexts[key]
            self._bound()

    def scope(self, info: StepInfo, unused: Callable[[StepInfo], None] | None = None) -> Scope:
        """Return a block in which the caller says this about the calls; `unused` is called at its end if none came."""
        return Scope(self._scope, info, unused)

    def info(self, calls_per_step: int) -> StepInfo:
        """Return what the caller said about a call; unnamed calls of one step take turns by the number that succeeded."""
        scope = self._scope.get()
        if scope is not None:
            scope.called = True
            return scope.info
        if calls_per_step == 1:
            return StepInfo(named=False)
        with self._lock:
            return StepInfo(f"{UNNAMED_PREFIX}{self._unnamed % calls_per_step}")

    def enter(self, info: StepInfo) -> AnyContext:
        """Lock the context of a call and return it.

        Raises:
            StateError: Another thread is in it.
        """
        with self._lock:
            context = self._contexts.get(info.key)
            if context is None:
                context = self._contexts[info.key] = self._make(info, next(self._ordinals))
                self._bound()
            self._contexts.move_to_end(info.key)
        if not context.lock.acquire(blocking=False):
            raise StateError(
                f"context {info.key!r} is in use by another thread. Give each thread its own context: `with cached.cache_context(name):`."
            )
        return context

    def _bound(self) -> None:
        """Drop what was called longest ago."""
        for name, context in list(self._contexts.items())[:-MAX_CONTEXTS]:
            if not context.lock.locked():
                del self._contexts[name]
        groups = {context.group for context in self._contexts.values()}
        self._latest = {group: tracker for group, tracker in self._latest.items() if group in groups}

    def reports(self, config: CacheConfig) -> dict[str, ContextReport]:
        """Return the current generation of each context that was called, by name, with what the policy of these settings says of it."""
        return {context.name: context.report(config) for context in self.values() if context.tracker.started}

    def latest(self, group: str) -> Tracker | None:
        """Return the tracker of the context that was called last in the newest run of a group."""
        with self._lock:
            return self._latest.get(group)

    def succeed(self, context: AnyContext, advance: Advance, record: RawStep, events: Sequence[str]) -> None:
        """Note a call that has succeeded; a new generation drops the records of the last one."""
        with self._lock:
            if advance.began:
                context.began, context.records, context.events = advance.began, [], []
            context.events += events
            context.records.append(record)
            context.tracker, context.called = advance.tracker, next(self._ordinals)
            newest = self._latest.get(context.group)
            if newest is None or newest.run <= advance.tracker.run:
                self._latest[context.group] = advance.tracker
            self._unnamed += self._scope.get() is None


class ContextMethods:
    """The methods about contexts that a cached model and a session share; each keeps its own `_contexts` and defines `configure`."""

    _contexts: ContextTable[Any]

    def cache_context(
        self, name: str, *, step_index: int | None = None, num_inference_steps: int | None = None, group: str = "", **details: Any
    ) -> contextlib.AbstractContextManager[None]:
        """Name the stream of calls that the block belongs to, and the step where the caller knows it.

        Args:
            name: Contexts of different names share nothing, and neither do those of different groups.
            step_index: Index of the denoising step; one that goes back begins a new generation.
            num_inference_steps: Steps of this generation, if the settings do not say.
            group: One for each video that is made at the same time. With `CacheConfig(decide="joint")` the contexts of a
                group decide together. Reports list a context of a group as `group/name`.
            **details: What else a pipeline knows (sigma, timestep); not needed.
        """
        return self._contexts.scope(StepInfo(name, step_index, num_inference_steps, group=group), self._unused)

    def _unused(self, info: StepInfo) -> None:
        """Called at the end of such a block if no call came in it."""

    def reset(self, num_steps: int | None = None) -> None:
        """Begin a new generation in every context; `num_steps` replaces the configured number from here on.

        Raises:
            ConfigError: `num_steps` does not fit the settings.
        """
        if num_steps is not None:
            self.configure(num_steps=num_steps)
        self._contexts.clear()

    def configure(self, **changes: Any) -> None:
        """Change settings."""
        raise NotImplementedError

    def drop_context(self, name: str, *, group: str = "") -> None:
        """Free the cache of one context, such as that of a request that was broken off; its next call begins a new generation.

        Raises:
            StateError: There is no such context, or another thread is in it.
        """
        self._contexts.drop(StepInfo(name, group=group).key)
