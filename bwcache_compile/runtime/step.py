"""One step of a cached model: what a call is, before its graph runs, and what is kept of it afterwards."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from bwcache_compile.clock import check_time
from bwcache_compile.config import CacheConfig
from bwcache_compile.contexts import ContextTable
from bwcache_compile.errors import CaptureError
from bwcache_compile.report import RawStep
from bwcache_compile.runtime.context import ModelContext, check_values, state_for, time_inputs, warn_without_reuse
from bwcache_compile.runtime.frames import hidden
from bwcache_compile.runtime.joint import synchronize_decisions
from bwcache_compile.runtime.match import ProgramMatch
from bwcache_compile.runtime.numbers import NumberInputs
from bwcache_compile.runtime.programs import ProgramCache
from bwcache_compile.runtime.signature import Parameters, call_key, changed_numbers, leaves_of
from bwcache_compile.runtime.state import CacheState
from bwcache_compile.step_events import StepEvent
from bwcache_compile.stepping import Advance, StepInfo


@dataclasses.dataclass
class StepCall:
    """One call on its way: who asked, what it is, what runs, and what it runs on.

    Attributes:
        context: Locked until the call ends.
        config: The settings when it began.
        advance: Which step of which generation it is.
        match: The program, and the model's version.
        state: What it runs on.
        events: What a report says of it.
        renumbered: Whether a Python number changed since the last call.
        num_steps: Steps of the generation, if known.
        kind: Names the graph.
        operands: Its inputs.
        first: What the graph returned already, where it was just checked on this call.
        told: What callbacks are told of it, once it has succeeded; None where there are none.
    """

    context: ModelContext
    config: CacheConfig
    advance: Advance
    match: ProgramMatch
    state: CacheState
    events: list[str]
    renumbered: bool
    num_steps: int | None
    kind: str
    operands: list[Any]
    first: list[Any] | None
    told: StepEvent | None = None


class Stepper:
    """Begins and finishes the calls of a cached model, which runs the graph in between."""

    def __init__(self, model: nn.Module, parameters: Parameters, programs: ProgramCache, contexts: ContextTable[ModelContext]) -> None:
        """Take what the cached model has; `parameters` are those of the model's forward."""
        self._model, self._parameters, self._programs, self._contexts = model, parameters, programs, contexts
        self._numbers = NumberInputs()

    @hidden
    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any], config: CacheConfig) -> StepCall:
        """Find the context, the program and the graph of a call. Its context is locked, and captures wait, until `end`.

        Raises:
            CaptureError, NoBlocksFoundError, UnsupportedGraphError, ConfigError, StateError: See `CachedModel.forward`.
        """
        args, kwargs = self._parameters.bind(args, kwargs)
        info = self._contexts.info(config.calls_per_step)
        context = self._contexts.enter(info)
        try:
            call = self._prepare(context, info, args, kwargs, config)
        except BaseException:
            context.lock.release()
            raise
        self._programs.gate.enter()
        return call

    def _prepare(
        self, context: ModelContext, info: StepInfo, args: tuple[Any, ...], kwargs: dict[str, Any], config: CacheConfig
    ) -> StepCall:
        """Decide what a call is. Nothing of its context changes before it has succeeded."""
        args, kwargs = self._numbers.as_tensors(args, kwargs)
        flat, structure = leaves_of(args, kwargs)
        key = call_key(flat, structure)
        if context.renumbered and context.key is not None:  # one change may have been another run's, two are the time's
            changed = changed_numbers(context.key, key)
            if changed:
                at, (before, _) = next(iter(changed.items()))
                return self._prepare_with_tensor(context, info, args, kwargs, config, at, before)
        num_steps = config.steps_of(info.num_steps)
        reuses = context.state is not None and context.state.reuses_next
        match = self._programs.match(args, kwargs, config, key, context.match, num_steps, reuses)
        first = match.first
        if first is not None:
            match = dataclasses.replace(match, first=None)  # contexts hold on to what they ran with
        runnable = match.runnable
        self._release_stale(context, match.version[0])
        check_values(context, match, num_steps)
        renumbered = context.key not in (None, match.key) and num_steps != 1 and bool(changed_numbers(context.key, match.key))
        times = time_inputs(flat) if info.step_index is None else {}
        advance = context.tracker.advance(info, match.signature, times, num_steps, self._contexts.latest(info.group))
        if config.decide == "joint" and not advance.began:
            synchronize_decisions(context, self._contexts.deciding(), config, num_steps)
        state, events = state_for(context, advance, match)
        kind = runnable.kind(state)
        if config.timesteps is not None and kind != "reuse":
            check_time(state.step, config.timesteps, time_inputs(flat).values())
        operands = runnable.operands(flat, state, runnable.parameters(config, num_steps, kind))
        if state.step != 0 or state.cursor.computed_at >= 0:
            first = None
        return StepCall(context, config, advance, match, state, events, renumbered, num_steps, kind, operands, first)

    def _prepare_with_tensor(
        self,
        context: ModelContext,
        info: StepInfo,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        config: CacheConfig,
        at: int,
        before: Any,
    ) -> StepCall:
        """Decide what a call is whose Python number at a position changes from call to call: it becomes a tensor from here on.

        Raises:
            StateError: The model does not accept a tensor there.
        """
        name = self._programs.latest.program.signature.inputs[at]
        with self._numbers.trying(self._model, (args, kwargs), at, name, before):
            self._programs.watch.accept_changes()  # the model ran
            call = self._prepare(context, info, args, kwargs, config)
            signature = call.match.runnable.program.signature
            if at in signature.read:
                raise CaptureError(f"its value is read in Python at {signature.read_at}")
        return call

    def _release_stale(self, current: ModelContext, structure: int) -> None:
        """Let idle contexts go of programs that hold weights which the model has dropped."""
        if current.version[0] == structure:
            return
        for other in self._contexts.values():
            if other is not current and other.version[0] != structure and other.lock.acquire(blocking=False):
                other.release()
                other.lock.release()

    @hidden
    def finish(self, call: StepCall, returned: Any, replayed: bool) -> Any:
        """Store what the graph returned, and return the model's output; see `RunnableProgram.split` for `replayed`."""
        before, context, runnable = call.state, call.context, call.match.runnable
        fresh = before.cursor.computed_at < 0
        decided = None if before.reuses_next or runnable.guarded else runnable.decided(call.config, call.num_steps, before.step)
        outputs, state, change = runnable.split(returned, before, replayed, decided)
        if fresh:  # what was decided together before belongs to another cache
            context.release()
        context.state, context.match = state, call.match
        context.key, context.version, context.renumbered = call.match.key, call.match.version, call.renumbered
        if state.slots is not before.slots:
            context.state_bytes = state.bytes
        record = RawStep(before.step, runnable.computes(before), fresh, change)
        call.told = self._contexts.succeed(
            context, call.advance, before.cursor, record, call.events, call.num_steps, in_graph=runnable.guarded
        )
        if call.num_steps is not None and before.step == call.num_steps - 1:
            context.release()
            warn_without_reuse(context, call.config)
        return outputs

    @hidden
    def end(self, call: StepCall) -> None:
        """Let other calls in, whether or not this one succeeded."""
        self._programs.gate.leave()
        call.context.lock.release()

    @hidden
    def tell(self, event: StepEvent) -> None:
        """Call the callbacks that are told of each step."""
        self._contexts.listeners.tell(event)
