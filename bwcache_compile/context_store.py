"""The contexts of one model or session by name: entered by one thread at a time, bounded in number. Needs no torch."""

from __future__ import annotations

import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from bwcache_compile.context import Context
from bwcache_compile.errors import StateError
from bwcache_compile.stepping import StepInfo, Tracker

MAX_CONTEXTS = 64
"""Contexts kept at a time; the one that was called longest ago is dropped first."""

_MOST_PER_SAMPLE = 16
"""Contexts kept at a time for each sample of the largest batch."""

AnyContext = TypeVar("AnyContext", bound=Context)


class ContextStore(Generic[AnyContext]):
    """Contexts by name. Threads may run different ones side by side."""

    def __init__(self, make: Callable[[StepInfo, int], AnyContext]) -> None:
        """Start without a context; `make` makes one for a call, with an ordinal."""
        self._make = make
        self._lock = threading.RLock()
        self._ordinals = itertools.count()
        self._largest_batch = 0
        self.clear()

    def clear(self) -> None:
        """Drop every context. A call that runs in one meanwhile is not disturbed, and leaves nothing behind."""
        with self._lock:
            self._contexts: OrderedDict[str, AnyContext] = OrderedDict()
            self._latest: dict[str, Tracker] = {}
            self._unnamed = 0

    def values(self) -> list[AnyContext]:
        """Return the contexts in the order of their first calls."""
        with self._lock:
            return sorted(self._contexts.values(), key=lambda context: context.created)

    def get(self, name: str) -> AnyContext | None:
        """Return a context by name."""
        with self._lock:
            return self._contexts.get(name)

    def latest(self, group: str) -> Tracker | None:
        """Return the tracker of the context that was called last in the newest run of a group."""
        with self._lock:
            return self._latest.get(group)

    def drop(self, key: str) -> None:
        """Forget a context: its cache is freed, and its next call begins a new generation.

        Raises:
            StateError: There is none of that name, or another thread is in it.
        """
        with self._lock:
            if key not in self._contexts:
                raise StateError(f"there is no context {key!r}. Contexts: {', '.join(self._contexts) or 'none'}.")
            self._drop([key])

    def drop_group(self, group: str) -> None:
        """Forget every context of a group.

        Raises:
            StateError: There is none, or another thread is in one; then all are kept.
        """
        with self._lock:
            found = [key for key, context in self._contexts.items() if context.group == group]
            if not found:
                raise StateError(f"there is no group {group!r}. Groups: {', '.join({c.group for c in self._contexts.values()}) or 'none'}.")
            self._drop(found)

    def _drop(self, keys: list[str]) -> None:
        for key in keys:
            if self._contexts[key].lock.locked():
                raise StateError(f"context {key!r} is in use by another thread and cannot be dropped now.")
        for key in keys:
            del self._contexts[key]
        self._bound()

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
        context.entered, context.caller = time.perf_counter(), threading.get_ident()
        return context

    def _bound(self) -> None:
        """Drop what was called longest ago."""
        most = max(MAX_CONTEXTS, _MOST_PER_SAMPLE * self._largest_batch)
        for name, context in list(self._contexts.items())[:-most]:
            if not context.lock.locked():
                del self._contexts[name]
        groups = {context.group for context in self._contexts.values()}
        self._latest = {group: tracker for group, tracker in self._latest.items() if group in groups}

    def put(self, info: StepInfo, fill: Callable[[AnyContext], None], run: int) -> None:
        """Make a context of this name and let `fill` give it a state; `run` is the run of the group that it belongs to.

        Raises:
            StateError: There is one already.
        """
        with self._lock:
            if info.key in self._contexts:
                raise StateError(f"there is a context {info.key!r} already. Drop it first, or use another name.")
            context = self._make(info, next(self._ordinals))
            fill(context)
            context.called = next(self._ordinals)
            self._contexts[info.key] = context
            newest = self._latest.get(info.group)
            if newest is None or newest.run <= run:
                self._latest[info.group] = context.tracker
            self._bound()

    def restore_point(self) -> Callable[[], None]:
        """Return what undoes the calls that this thread makes from here on: those of one part of a model, of which another part fails.

        What other threads do in contexts of their own meanwhile stays.
        """
        thread = threading.get_ident()
        with self._lock:
            contexts, latest, unnamed = self._contexts, dict(self._latest), self._unnamed
            saved = {context: (dict(vars(context)), len(context.records), len(context.events)) for context in contexts.values()}

        def restore() -> None:
            with self._lock:
                kept = self._contexts is contexts  # else all of them were dropped meanwhile
                self._unnamed = unnamed if kept else 0
                for key, context in list(self._contexts.items()):
                    values, records, events = saved.get(context, ({}, 0, 0)) if kept else ({}, 0, 0)
                    if context.caller != thread or context.called == values.get("called"):
                        continue
                    if self._latest.get(context.group) is context.tracker:
                        del self._latest[context.group]
                        self._latest |= {group: tracker for group, tracker in latest.items() if kept and group == context.group}
                    if values:
                        vars(context).update(values)
                        del context.records[records:], context.events[events:]
                    else:  # there was none
                        del self._contexts[key]

        return restore
