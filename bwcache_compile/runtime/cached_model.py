"""The cached model: called like the original, it computes or reuses, and keeps one state per context."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bwcache_compile.clock import check_time
from bwcache_compile.config import CacheConfig
from bwcache_compile.contexts import ContextTable
from bwcache_compile.errors import CaptureError, ConfigError, StateError, warn
from bwcache_compile.ir.compare import Verify
from bwcache_compile.ir.graph_text import GraphDiff
from bwcache_compile.ir.plan import CachePlan
from bwcache_compile.ir.program import ModelProgram
from bwcache_compile.ir.torch_compat import pytree
from bwcache_compile.report import RawStep, Report
from bwcache_compile.runtime.context import ModelContext, check_values, state_for, time_inputs, warn_without_reuse
from bwcache_compile.runtime.fingerprint import check_calibrated
from bwcache_compile.runtime.frames import call_directly, hidden, left_out
from bwcache_compile.runtime.functional import check_inputs, check_state, first_state, guarded_step, host_step
from bwcache_compile.runtime.joint import synchronize_decisions
from bwcache_compile.runtime.numbers import NumberInputs
from bwcache_compile.runtime.programs import ProgramCache, ProgramMatch
from bwcache_compile.runtime.runnable import run_all
from bwcache_compile.runtime.signature import CallKey, Parameters, call_key, changed_numbers, leaves_of
from bwcache_compile.runtime.state import CacheState, GuardedState
from bwcache_compile.runtime.trial import Toolchain
from bwcache_compile.runtime.wrapper import ModelWrapper
from bwcache_compile.stepping import Advance, StepInfo

_NO_MODE = contextlib.nullcontext()


@dataclasses.dataclass
class _Call:
    """One call on its way: who asked, what it is, what runs, and what it runs on.

    Attributes:
        context: Locked until the call ends.
        advance: Which step of which generation it is.
        fit: The program, and the model's version.
        state: What it runs on.
        events: What a report says of it.
        renumbered: Whether a Python number changed since the last call.
        num_steps: Steps of the generation, if known.
        kind: Names the graph.
        operands: Its inputs.
        first: What the graph returned already, where it was just checked on this call.
    """

    context: ModelContext
    advance: Advance
    fit: ProgramMatch
    state: CacheState
    events: list[str]
    renumbered: bool
    num_steps: int | None
    kind: str
    operands: list[Any]
    first: list[Any] | None


class CachedModel(ModelWrapper):
    """A drop-in for the model it wraps. Made by `bwcache_compile.transform`.

    Contexts are independent: two threads may run two contexts, but not the same one.
    """

    def __init__(
        self, model: nn.Module, config: CacheConfig, toolchain: Toolchain, dynamic_shapes: Any = None, verify: Verify = "bitwise"
    ) -> None:
        """Wrap a model; nothing is captured yet."""
        super().__init__(model)
        check_calibrated(model, config)
        self.cache_config = config
        self._toolchain = toolchain
        self._dynamic_shapes, self._verify = dynamic_shapes, verify
        self._programs = ProgramCache(model, toolchain, dynamic_shapes, verify)
        self._call_parameters = Parameters.of(model)
        self._numbers = NumberInputs()
        self._contexts = ContextTable(ModelContext)
        self._closed = self._bypassed = False
        self._seal()

    def __repr__(self) -> str:
        """Say what it wraps, what is captured, and what is cached; the modules are those of the original."""
        name, config = type(self._original).__name__, self.cache_config
        said = f"CachedModel({name}, policy={config.policy!r}, reuse={config.reuse!r}, guard={self._toolchain.guard!r}, "
        if self._closed:
            return said + "closed)"
        count = len(self._programs)
        if not count:
            return said + "not captured yet)"
        return said + f"{len(self.plan.blocks)} blocks cached, {count} program{'s' * (count > 1)})"

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        """Copy or pickle the model and the settings; the copy captures anew and starts without state."""
        return CachedModel, (self._original, self.cache_config, self._toolchain, self._dynamic_shapes, self._verify)

    @property
    def original(self) -> nn.Module:
        """The model that is wrapped."""
        return self._original

    @property
    def guard(self) -> str:
        """Who decides at each step: "host" or "graph"."""
        return self._toolchain.guard

    def with_settings(self, config: CacheConfig) -> CachedModel:
        """Return another cached model of the same model: its settings, programs and contexts are its own.

        Raises:
            ConfigError: The settings do not fit the guard.
        """
        config.check_guard(self._toolchain.guard)
        return CachedModel(self._original, config, self._toolchain, self._dynamic_shapes, self._verify)

    def _changed(self) -> None:
        self.invalidate()

    def _touched(self) -> None:
        self._programs.suspect()

    # -- programs ------------------------------------------------------------------------------------------------

    def prepare(self, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> CachePlan:
        """Capture the model for inputs like these now instead of at the first call, and return the plan."""
        return self._fit(*self._call_parameters.bind(args, kwargs or {})).loaded.plan

    def _fit(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        key: CallKey | None = None,
        held: ProgramMatch | None = None,
        num_steps: int | None = None,
        reuses: bool = False,
    ) -> ProgramMatch:
        if self._closed:
            raise StateError("this cached model was closed; transform the model again.")
        key = key or call_key(*leaves_of(args, kwargs))
        return self._programs.fit(args, kwargs, key, self.cache_config, held, num_steps or self.cache_config.steps, reuses)

    @property
    def plan(self) -> CachePlan:
        """The plan of the program used last."""
        return self._programs.latest.plan

    @property
    def program(self) -> ModelProgram:
        """The program used last."""
        return self._programs.latest.program

    @property
    def call_parameters(self) -> tuple[str, ...]:
        """Names of what the model's forward takes by position, in order."""
        parameters = inspect.signature(self._original.forward).parameters.values()
        return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))

    @property
    def cached_programs(self) -> tuple[ModelProgram, ...]:
        """Every program there is, one per signature."""
        return self._programs.all

    # -- calling -------------------------------------------------------------------------------------------------

    @left_out
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run one denoising step, computing the blocks or reusing what they last returned.

        Takes and returns what the original takes and returns.

        Raises:
            CaptureError, NoBlocksFoundError, UnsupportedGraphError: At the first call of a signature.
            ConfigError: The settings do not fit the model or the call.
            StateError: The context is in use, the model is closed or training, or an input requires gradients.
        """
        call = self._begin(args, kwargs)
        try:
            # entering the mode once more, inside a pipeline's, would cost as much as a small operator
            with torch.no_grad() if torch.is_grad_enabled() else _NO_MODE:
                # the graph is the only frame that an outer torch.compile compiles
                graph = call.fit.loaded.graph(call.kind)
                returned = call.first if call.first is not None else call_directly(graph, call.operands)
            return self._finish(call, returned)
        finally:
            self._end(call)

    @hidden
    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        args, kwargs = self._call_parameters.bind(args, kwargs)
        info = self._contexts.info(self.cache_config.calls_per_step)
        context = self._contexts.enter(info)
        try:
            call = self._prepared(context, info, args, kwargs)
        except BaseException:
            context.lock.release()
            raise
        self._programs.gate.enter()
        return call

    def _prepared(self, context: ModelContext, info: StepInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        """Decide what a call is. Nothing of its context changes before it has succeeded."""
        args, kwargs = self._numbers.as_tensors(args, kwargs)
        config = self.cache_config
        flat, structure = leaves_of(args, kwargs)
        key = call_key(flat, structure)
        if context.renumbered and context.key is not None:  # one change may have been another run's, two are the time's
            changed = changed_numbers(context.key, key)
            if changed:
                at, (before, _) = next(iter(changed.items()))
                name = self._programs.latest.program.signature.inputs[at]
                with self._numbers.trying(self._original, (args, kwargs), at, name, before):
                    self._programs.watch.accept_changes()  # the model ran
                    call = self._prepared(context, info, args, kwargs)
                    signature = call.fit.loaded.program.signature
                    if at in signature.read:
                        raise CaptureError(f"its value is read in Python at {signature.read_at}")
                    return call
        num_steps = config.steps_of(info.num_steps)
        fit = self._fit(args, kwargs, key, context.fit, num_steps, context.state is not None and context.state.reuses_next)
        first = fit.first
        if first is not None:
            fit = dataclasses.replace(fit, first=None)  # contexts hold on to what they ran with
        loaded = fit.loaded
        self._release_stale(context, fit.version[0])
        check_values(context, fit, num_steps)
        renumbered = context.key not in (None, fit.key) and num_steps != 1 and bool(changed_numbers(context.key, fit.key))
        times = time_inputs(flat) if info.step_index is None else {}
        advance = context.tracker.advance(info, fit.signature, times, num_steps, self._contexts.latest(info.group))
        if config.decide == "joint" and not advance.began:
            synchronize_decisions(context, self._contexts.values(), config, num_steps)
        state, events = state_for(context, advance, fit)
        kind = loaded.kind(state)
        if config.timesteps is not None and kind != "reuse":
            check_time(state.step, config.timesteps, time_inputs(flat).values())
        operands = loaded.operands(flat, state, loaded.parameters(config, num_steps))
        if state.step != 0 or state.cursor.computed_at >= 0:
            first = None
        return _Call(context, advance, fit, state, events, renumbered, num_steps, kind, operands, first)

    def _release_stale(self, current: ModelContext, structure: int) -> None:
        """Let idle contexts go of programs that hold weights which the model has dropped."""
        if current.version[0] == structure:
            return
        for other in self._contexts.values():
            if other is not current and other.version[0] != structure and other.lock.acquire(blocking=False):
                other.release()
                other.lock.release()

    @hidden
    def _finish(self, call: _Call, returned: Any) -> Any:
        before, context, loaded = call.state, call.context, call.fit.loaded
        fresh = before.cursor.computed_at < 0
        outputs, state, change = loaded.split(returned, before)
        if fresh:  # what was decided together before belongs to another cache
            context.release()
        context.state, context.fit = state, call.fit
        context.key, context.version, context.renumbered = call.fit.key, call.fit.version, call.renumbered
        if state.slots is not before.slots:
            context.state_bytes = state.bytes
        self._contexts.succeed(context, call.advance, RawStep(before.step, loaded.computes(before), fresh, change), call.events)
        if call.num_steps is not None and before.step == call.num_steps - 1:
            context.release()
            warn_without_reuse(context, self.cache_config)
        return outputs

    @hidden
    def _end(self, call: _Call) -> None:
        self._programs.gate.leave()
        call.context.lock.release()

    # -- the functional form -------------------------------------------------------------------------------------

    def init_state(self, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> CacheState | GuardedState:
        """Return the state of a fresh context for inputs like these, capturing the model if need be."""
        return first_state(self._fit(*self._call_parameters.bind(args, kwargs or {})))

    def policy_parameters(self, **changes: Any) -> tuple[Tensor, ...]:
        """Return the policy's inputs for `step`, from the settings with some of them changed.

        Raises:
            ConfigError: A value is bad, or the setting is built into the graphs.
        """
        config = self._changed_config(changes)
        return self._programs.latest.parameters(config, config.steps)

    def functional_step(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        state: CacheState | GuardedState,
        parameters: tuple[Tensor, ...] | None = None,
    ) -> tuple[Any, CacheState | GuardedState]:
        """Run one step on a state that the caller owns: no context, no report, nothing kept.

        With `guard="graph"` and a model that is captured already (`example_args`), `torch.compile(cached.functional_step,
        fullgraph=True)` compiles it as one graph; pass `parameters` then.

        Args:
            args: Positional arguments of the model.
            kwargs: Keyword arguments of the model.
            state: From `init_state` or the step before. It stays valid: stepping twice from one state gives the same.
            parameters: From `policy_parameters`; the model's own settings if not given.

        Returns:
            The model's output and the next state.

        Raises:
            StateError: The state belongs to other inputs.
        """
        args, kwargs = self._call_parameters.bind(args, kwargs)
        flat = pytree.tree_leaves((args, kwargs))
        if isinstance(state, GuardedState) and torch.compiler.is_compiling():
            if parameters is None:
                raise ConfigError(
                    "inside torch.compile, pass parameters=cached.policy_parameters() to cached.functional_step: settings are inputs of"
                    " the graph."
                )
            check_inputs(self._programs.only, flat)
            return guarded_step(self._programs.only, flat, state, parameters)
        fit = self._fit(args, kwargs)
        check_state(fit, state)
        if parameters is None:
            parameters = fit.loaded.parameters(self.cache_config, self.cache_config.steps)
        with self._programs.gate.running():
            if isinstance(state, GuardedState):
                return guarded_step(fit.loaded, flat, state, parameters)
            return host_step(fit.loaded, flat, state, parameters)

    # -- life ----------------------------------------------------------------------------------------------------

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
        return self._contexts.scope(StepInfo(name, step_index, num_inference_steps, group=group), self._warn_unused)

    def _warn_unused(self, info: StepInfo) -> None:
        """Say once that calls go around the cached model."""
        if not self._bypassed:
            self._bypassed = True
            warn(
                f"the block `with cache_context({info.context!r})` ended without a call of the cached model, so nothing was cached."
                " Call the result of transform instead of the original model."
            )

    def reset(self, num_steps: int | None = None) -> None:
        """Begin a new generation in every context; `num_steps` replaces the configured number from here on.

        Raises:
            ConfigError: `num_steps` does not fit the settings.
        """
        if num_steps is not None:
            self.configure(num_steps=num_steps)
        self._contexts.clear()

    def _changed_config(self, changes: dict[str, Any]) -> CacheConfig:
        config = self.cache_config.changed(**changes)
        config.check_guard(self._toolchain.guard)
        return config

    def drop_context(self, name: str, *, group: str = "") -> None:
        """Free the cache of one context, such as that of a request that was broken off; its next call begins a new generation.

        Raises:
            StateError: There is no such context, or another thread is in it.
        """
        self._contexts.drop(StepInfo(name, group=group).key)

    def configure(self, config: CacheConfig | Mapping[str, Any] | None = None, /, **changes: Any) -> None:
        """Change settings, or replace them all by a `CacheConfig`.

        Those that are inputs of the graphs (thresholds, a mask, weights) take effect at the next computed step and recompile nothing.
        Those that shape the graphs (`CacheConfig.graph_settings`) make the graphs anew from what is captured already, and every
        context begins a new generation.

        Raises:
            ConfigError, UnsupportedGraphError: A value is bad or does not fit the model. The settings stay what they were.
            StateError: The settings were calibrated for another model.
        """
        given = CacheConfig.of(self.cache_config if config is None or isinstance(config, Mapping) else config)
        new = CacheConfig.of(given, **{**(config if isinstance(config, Mapping) else {}), **changes})
        new.check_guard(self._toolchain.guard)
        check_calibrated(self._original, new)
        if new.graph_settings != self.cache_config.graph_settings:
            self._programs.rebuild(new)
            self._contexts.clear()
        self.cache_config = new

    def invalidate(self) -> None:
        """Take the weights for changed: each context drops what it cached at its next call and keeps its step.

        For weights that were edited where no version counts it.
        """
        self._programs.touch()

    def close(self) -> None:
        """Free every program and state. The original model is as it was."""
        self._closed = True
        self._programs.clear()
        self._contexts.clear()

    def compile(self, **options: Any) -> None:
        """Compile each program's graphs with `torch.compile(**options)`, those captured later too."""
        self._programs.compile(options)

    def warm_up(self, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> None:
        """Run every graph once for inputs like these, so that whatever compiles does so now. No state is touched."""
        args, kwargs = self._call_parameters.bind(args, kwargs or {})
        fit = self._fit(args, kwargs)
        num_steps = self.cache_config.steps or 2
        parameters = fit.loaded.parameters(self.cache_config, num_steps)
        with self._programs.gate.running():
            run_all(fit.loaded, pytree.tree_leaves((args, kwargs)), fit.loaded.fresh(fit.sizes), parameters)

    def report(self) -> Report:
        """Return what each context did in its current generation. Reads the indicator from the device."""
        blocks = tuple(m.block for m in self.plan.measured) if len(self._programs) else ()
        contexts = {context.name: context.report() for context in self._contexts.values() if context.tracker.started}
        return Report(contexts, blocks, self._programs.captured)

    def graph_diff(self) -> dict[str, GraphDiff]:
        """Return what each pass changed, by its name, and what all did together, under "whole"."""
        return self._programs.explain(self.cache_config)
