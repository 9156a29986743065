"""The contexts of one model or session, and which of them a call belongs to. Needs no torch."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from contextvars import ContextVar

from bwcache_compile.config import CacheConfig
from bwcache_compile.context_scope import Scope, row_group
from bwcache_compile.context_store import AnyContext, ContextStore
from bwcache_compile.errors import ConfigError, StateError
from bwcache_compile.report import ContextReport, RawStep
from bwcache_compile.step_events import Listeners, StepEvent, step_event
from bwcache_compile.stepping import Advance, Cursor, RunStep, StepInfo

LOGGER = logging.getLogger(__name__)

UNNAMED_PREFIX = "call_"
"""How the contexts of a step's calls begin that the caller does not name, with `CacheConfig.calls_per_step`."""

_MOST_CALLS = 16
"""Calls without a context name at one step of a run that is followed."""


class ContextTable(ContextStore[AnyContext]):
    """Contexts, and what is said of calls: by the caller, by the loop that is followed, or by their number.

    Attributes:
        follow: Says at each call which run and step of the caller's loop it belongs to; None leaves it to `cache_context` and the time.
        listeners: What is called after each step.
    """

    def __init__(self, make: Callable[[StepInfo, int], AnyContext]) -> None:
        """Start without a context; `make` makes one for a call, with an ordinal."""
        super().__init__(make)
        self._scope: ContextVar[Scope | None] = ContextVar("bwcache_scope", default=None)
        self.follow: Callable[[], RunStep | None] | None = None
        self._run: object = None
        self.listeners = Listeners()
        self._beside: tuple[ContextTable[AnyContext], ...] = ()

    def join(self, other: ContextTable[AnyContext]) -> None:
        """Let the contexts of two tables decide together (`decide="joint"`): those of two parts of one model.

        Their calls are numbered together from here on.
        """
        self._beside, other._beside = (*self._beside, other), (*other._beside, self)
        other._ordinals = self._ordinals

    def deciding(self) -> list[AnyContext]:
        """Return the contexts that may decide together: those of this table, and of those that it was joined with."""
        return [context for table in (self, *self._beside) for context in table.values()]

    def scope(self, info: StepInfo, unused: Callable[[StepInfo], None] | None = None, rows: tuple[StepInfo, ...] | None = None) -> Scope:
        """Return a block in which the caller says this about the calls, or about the samples of their batch."""
        return Scope(self._scope, info, unused, rows)

    def named_rows(self) -> int | None:
        """Return how many samples the caller named; None where none are."""
        scope = self._scope.get()
        return None if scope is None or scope.rows is None else len(scope.rows)

    def info(self, calls_per_step: int) -> StepInfo:
        """Return what the caller said about a call; unnamed calls of one step take turns by the number that succeeded.

        Where a loop is followed, a new run drops every context, and unnamed calls at a step that the loop counts are numbered from 0.

        Raises:
            ConfigError: The caller named the samples of a batch, which decide together.
            StateError: The loop that is followed does not go on.
        """
        if self.named_rows() is not None:
            raise ConfigError("cache_context(rows=...) names the samples of a batch, which requires batch_reduce='per_sample'.")
        return self._info(calls_per_step, "")

    def row_infos(self, count: int, calls_per_step: int) -> list[StepInfo]:
        """Return what the caller said about each of `count` samples of a batch; those without names are numbered.

        A sample is a group of its own: its contexts, with and without guidance, share nothing with those of other samples.
        """
        scope = self._scope.get()
        rows = scope.rows if scope is not None else None
        self._largest_batch = max(self._largest_batch, count)
        if rows is None:
            said = self._info(calls_per_step, "0")
            return [dataclasses.replace(said, group=row_group(str(row), said.group)) for row in range(count)]
        said = self._info(calls_per_step, rows[0].group)
        return [
            dataclasses.replace(
                row,
                step_index=said.step_index if row.step_index is None else row.step_index,
                num_steps=said.num_steps if row.num_steps is None else row.num_steps,
            )
            for row in rows
        ]

    def _info(self, calls_per_step: int, group: str) -> StepInfo:
        """Return what the caller said about a call; `group` is that in which unnamed calls are looked for."""
        scope = self._scope.get()
        now = self.follow() if self.follow is not None else None
        if now is not None:
            self._enter_run(now.run)
        if scope is not None:
            scope.called, said = True, scope.info
        elif now is not None and now.counts_steps:
            said = StepInfo(self._call_of_step(now.step, group))
        elif calls_per_step == 1:
            said = StepInfo(named=False)
        else:
            with self._lock:
                said = StepInfo(f"{UNNAMED_PREFIX}{self._unnamed % calls_per_step}")
        if now is None:
            return said
        return dataclasses.replace(said, step_index=now.step if said.step_index is None else said.step_index, num_steps=now.num_steps)

    def _enter_run(self, run: object) -> None:
        """Drop every context if another run of the followed loop begins."""
        with self._lock:
            if run is not self._run:
                self.clear()
                self._run = run

    def _call_of_step(self, step: int | None, group: str) -> str:
        """Return the context of an unnamed call: the first that has not had this step, or in the first step, was not called yet.

        Raises:
            StateError: There are too many.
        """
        for name in (f"{UNNAMED_PREFIX}{i}" for i in range(_MOST_CALLS)):
            context = self.get(StepInfo(name, group=group).key)
            if context is None or not context.tracker.started or (step is not None and context.tracker.next_step <= step):
                return name
        raise StateError(
            f"the model was called {_MOST_CALLS} times at step {step or 0} of a pipeline's run, and the pipeline's scheduler did not"
            " advance. If another loop than the pipeline calls the model, transform the model itself: call disable(pipe), then"
            " transform(pipe.transformer)."
        )

    def reports(self, config: CacheConfig) -> dict[str, ContextReport]:
        """Return the current generation of each context that was called, by name, with what the policy of these settings says of it."""
        return {context.name: context.report(config) for context in self.values() if context.tracker.started}

    def succeed(
        self,
        context: AnyContext,
        advance: Advance,
        before: Cursor,
        record: RawStep,
        events: Sequence[str],
        num_steps: int | None,
        *,
        in_graph: bool = False,
        ends_call: bool = True,
    ) -> StepEvent | None:
        """Note a call that has succeeded, and return what callbacks are to be told of it, if there are any.

        A new generation drops the records of the last one.

        Args:
            context: Its context, locked.
            advance: What the call was.
            before: The cursor on which the step ran.
            record: What the step did.
            events: What happened to the cache.
            num_steps: Steps of the generation, if known.
            in_graph: Whether the guard is in the graph.
            ends_call: Of a batch, the last sample ends the call.
        """
        if advance.began:
            LOGGER.debug("context %r: a new generation began at step %d (%s)", context.name, advance.step, advance.began)
        for event in events:
            LOGGER.info("context %r: %s", context.name, event)
        with self._lock:
            if advance.began:
                context.began, context.records, context.events = advance.began, [], []
            context.events += events
            context.records.append(record)
            context.tracker, context.called = advance.tracker, next(self._ordinals)
            newest = self._latest.get(context.group)
            if newest is None or newest.run <= advance.tracker.run:
                self._latest[context.group] = advance.tracker
            self._unnamed += ends_call and self._scope.get() is None
        if not self.listeners:
            return None
        return step_event(context.name, context.entered, num_steps, advance, before, record, events, in_graph)
