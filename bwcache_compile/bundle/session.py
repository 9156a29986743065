"""A bundle as a model: called step after step, whatever runtime holds its graphs. Needs no torch, no numpy and no onnxruntime."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

from bwcache_compile.bundle.call import Call, Runner, bound, flat_call, put_together
from bwcache_compile.bundle.files import Bundle
from bwcache_compile.bundle.manifest import Manifest
from bwcache_compile.bundle.settings import policy_inputs
from bwcache_compile.clock import HALF, TimeInput, check_time, may_be_time
from bwcache_compile.config import CacheConfig
from bwcache_compile.context import Context
from bwcache_compile.context_methods import ContextMethods
from bwcache_compile.contexts import ContextTable
from bwcache_compile.errors import ConfigError, StateError
from bwcache_compile.graph_io import INDICATOR, REUSE_LEFT, STEP, UNTIL, cache_in, cache_out
from bwcache_compile.report import RawStep, Report
from bwcache_compile.stepping import Cursor, StepInfo


@dataclasses.dataclass(frozen=True)
class SessionState:
    """The cache of one context.

    Attributes:
        slots: The runtime's values, by slot.
        cursor: The next step, and which steps reuse.
    """

    slots: dict[str, Any]
    cursor: Cursor


class SessionContext(Context):
    """One stream of calls of a session.

    Attributes:
        state: The cache, while a generation runs.
        spare: Where the runtime takes buffers: the set that the next computed step writes to.
    """

    def __init__(self, info: StepInfo, created: int) -> None:
        """Start before the first call."""
        super().__init__(info, created)
        self.state: SessionState | None = None
        self.spare: dict[str, Any] = {}


class Session(ContextMethods):
    """A bundle as a model: `session(**inputs)` computes or reuses, and keeps one state per context on the device.

    Made by `bwcache_compile.load`. A step that fails leaves its context as it was: the next call takes its place.
    """

    def __init__(self, bundle: Bundle, runner: Runner, *, guarded: bool = False) -> None:
        """Run a bundle's graphs, the pair or the one that decides by itself."""
        self.manifest: Manifest = bundle.manifest
        self.cache_config: CacheConfig = bundle.manifest.config
        self.guarded, self._bundle, self._runner = guarded, bundle, runner
        self._contexts = ContextTable(SessionContext)
        settings = policy_inputs(self.cache_config)
        self._taken = {kind: [item for item in settings if item.name in graph.inputs] for kind, graph in self.manifest.graphs.items()}
        self._last_settings: dict[str, tuple[CacheConfig, int | None, dict[str, Any]]] = {}

    def __repr__(self) -> str:
        """Say which bundle runs in which runtime, with which settings."""
        manifest, config = self.manifest, self.cache_config
        kinds = "guarded" if self.guarded else "compute and reuse"
        return (
            f"Session({manifest.model}, format={manifest.graph_format!r}, {kinds} graphs, device={self._runner.device!r},"
            f" policy={config.policy!r}, reuse={config.reuse!r})"
        )

    # -- calling -------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one denoising step. Takes what the model takes, as arrays or tensors; see `load` for the kinds.

        Returns:
            What the model returns: numpy arrays (OrtValues with `outputs="ortvalue"`), or with `backend="torch"` tensors.

        Raises:
            StateError: The inputs do not fit the bundle, or the context is in use.
            ConfigError: The policy needs the number of steps and it is not known, or is not the length of its mask.
            BundleError: The runtime failed.
        """
        values = self._step(bound(self.manifest, self._runner, args, kwargs))
        return put_together(self.manifest.outputs.form, values)

    def run_flat(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Run one step on inputs by the names that the graphs have for them; returns outputs by name."""
        return self._step(flat_call(self.manifest, self._runner, inputs))

    def state(self, context: str) -> dict[str, Any]:
        """Copy a context's cache to the host, by slot.

        Raises:
            StateError: No call was in that context, or a slot is bfloat16 and the runtime hands out numpy arrays.
        """
        held = self._contexts.get(context)
        if held is None or held.state is None:
            there = ", ".join(held.name for held in self._contexts.values() if held.state is not None)
            raise StateError(
                f"context {context!r} has no cache: it was not called yet, or its generation has ended. Contexts with a cache:"
                f" {there or 'none'}."
            )
        return {name: self._runner.host(value) for name, value in held.state.slots.items()}

    def _step(self, call: Call) -> dict[str, Any]:
        info = self._contexts.info(self.cache_config.calls_per_step)
        context, told = self._contexts.enter(info), None
        try:
            num_steps = self.cache_config.steps_of(info.num_steps)
            times = self._times(call) if info.step_index is None else {}
            signature = tuple(call.shapes.items())
            advance = context.tracker.advance(info, signature, times, num_steps, self._contexts.latest(context.group))
            events = [advance.event] if advance.event else []
            if advance.began or advance.cleared or context.state is None:
                state = self._fresh(context, call, advance.step)
            else:
                state = dataclasses.replace(context.state, cursor=context.state.cursor.at(advance.step))
            if self.cache_config.timesteps is not None and not state.cursor.reuses:
                check_time(advance.step, self.cache_config.timesteps, self._times(call).values())
            returned, following, record = self._run(context, state, call, num_steps)
            outputs = {item.name: self._runner.to_output(returned[item.name]) for item in self.manifest.outputs.items}
            if following.slots is not state.slots:  # the two sets of buffers take turns
                context.spare = state.slots if self._runner.takes_buffers else {}
            context.state, context.state_bytes = following, sum(map(self._runner.bytes, following.slots.values()))
            told = self._contexts.succeed(context, advance, state.cursor, record, events, num_steps)
            if num_steps is not None and record.step == num_steps - 1:
                context.state, context.spare = None, {}
        finally:
            context.lock.release()
        if told is not None:
            self._contexts.listeners.tell(told)
        return outputs

    def _times(self, call: Call) -> Mapping[Hashable, TimeInput]:
        """Return the inputs of a call that may be the time, by name."""

        def input_of(name: str, dtype: str) -> TimeInput:
            return TimeInput(len(call.shapes[name]), dtype in HALF, lambda: self._runner.numbers(call.values[name]))

        return {
            entry.name: input_of(entry.name, entry.dtype)
            for entry in self.manifest.inputs
            if may_be_time(call.shapes[entry.name], entry.dtype)
        }

    def _fresh(self, context: SessionContext, call: Call, step: int) -> SessionState:
        """Return the state of a context that has computed nothing, at a call's sizes."""
        runner = self._runner
        slots = [(slot.name, slot.dtype, call.sizes_of(slot.shape), float(slot.fill)) for slot in self.manifest.slots]
        if self.guarded:
            slots.append((UNTIL, "int64", (1,), -1.0))
        made = {name: runner.full(name, shape, dtype, fill) for name, dtype, shape, fill in slots}
        same = {name: runner.kind(value)[1] for name, value in context.spare.items()} == {name: shape for name, _, shape, _ in slots}
        if runner.takes_buffers and not same:
            context.spare = {name: runner.full(name, shape, dtype, 0) for name, dtype, shape, _ in slots}
        return SessionState(made, Cursor(step))

    def _parameters(self, num_steps: int | None, kind: str) -> dict[str, Any]:
        """Return what a graph takes of the settings; the values of the last settings are kept."""
        config, last = self.cache_config, self._last_settings.get(kind)
        if last is not None and config is last[0] and num_steps == last[1]:
            return last[2]
        taken = self._taken[kind]
        values = config.policy_values(num_steps, [item.parameter for item in taken])
        made = {item.name: self._runner.vector(values[item.parameter], item.dtype) for item in taken}
        self._last_settings[kind] = config, num_steps, made
        return made

    def _run(
        self, context: SessionContext, state: SessionState, call: Call, num_steps: int | None
    ) -> tuple[dict[str, Any], SessionState, RawStep]:
        """Run a step; return everything that the graph returned, the state afterwards, and what the step did."""
        cursor, runner = state.cursor, self._runner
        kind = "guarded" if self.guarded else "reuse" if cursor.reuses else "compute"
        inputs = {**call.values, **{cache_in(name): value for name, value in state.slots.items()}}
        inputs[STEP] = runner.vector([cursor.step], "int64")
        inputs |= self._parameters(num_steps, kind)
        returned = runner.run(kind, inputs, {cache_out(name): value for name, value in context.spare.items()})
        change = runner.host(returned[INDICATOR]) if INDICATOR in returned else None
        slots = state.slots
        if kind != "reuse":
            slots = {name: returned[cache_out(name)] for name in state.slots}
        computed, until = kind == "compute", cursor.reuse_until
        if kind == "compute":
            until = cursor.step + int(runner.host(returned[REUSE_LEFT])[0])
        elif kind == "guarded" and cursor.step > until:  # eight bytes; the caches stay where they are
            computed, until = True, int(runner.host(slots[UNTIL])[0])
        record = RawStep(cursor.step, computed, cursor.computed_at < 0, change)
        return returned, SessionState(slots, cursor.computed(until - cursor.step) if computed else cursor.reused()), record

    # -- life ----------------------------------------------------------------------------------------------------

    def configure(self, **changes: Any) -> None:
        """Change policy settings; they take effect at the next computed step.

        Raises:
            ConfigError: A value is bad, or the setting is built into the graphs.
        """
        config = self.cache_config.changed(**changes)
        if config.decide == "joint":
            raise ConfigError("decide='joint' is not supported by a bundle's session, whose contexts decide separately.")
        self.cache_config = config

    def with_settings(self, **changes: Any) -> Session:
        """Return another session of the same graphs and weights, with policy settings and contexts of its own.

        Raises:
            ConfigError: A value is bad, or the setting is built into the graphs.
        """
        other = Session(self._bundle, self._runner, guarded=self.guarded)
        other.cache_config = self.cache_config
        other.configure(**changes)
        return other

    def report(self) -> Report:
        """Return what each context did in its current generation."""
        return Report(self._contexts.reports(self.cache_config), self.manifest.measured)
