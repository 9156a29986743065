"""The cached model of a model that no graph can be made of: its own Python runs, and the calls of its blocks are guarded."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bwcache_compile.clock import check_time
from bwcache_compile.config import CacheConfig
from bwcache_compile.contexts import ContextTable
from bwcache_compile.errors import CaptureError, ConfigError, StateError, warn
from bwcache_compile.ir.compare import Verify, difference, flat_outputs
from bwcache_compile.ir.ranks import ALONE, Agreement, Ranks
from bwcache_compile.ir.torch_compat import pytree
from bwcache_compile.opaque.cache import OpaqueState, ReusedOutputs, computed_state
from bwcache_compile.opaque.guards import BlockCall, CallPlace, CallsChanged, ComputeCalls, ReuseCalls
from bwcache_compile.opaque.measure import MeasuredCalls, features_of
from bwcache_compile.opaque.output import computed_output, reused_output
from bwcache_compile.opaque.runner import ModelRunner
from bwcache_compile.opaque.step import OpaqueContext, OpaqueStep, moment_of, numbers_as_tensors, signature_of, state_for
from bwcache_compile.region.uncaptured import UncapturedModel, check_calibration
from bwcache_compile.report import RawStep, Report
from bwcache_compile.runtime.context import time_inputs, warn_without_reuse
from bwcache_compile.runtime.joint import synchronize_decisions
from bwcache_compile.step_events import StepEvent
from bwcache_compile.stepping import StepInfo


class OpaqueModel(UncapturedModel):
    """A drop-in for a model of which no graph can be made. Made by `transform(model, capture="opaque")`.

    At its first call the model runs once while the calls of the modules in its lists are written down; those that do most of the
    work are its blocks. At a computed step each block runs and its output is kept; at a reused step no block runs, and each of its
    calls returns what is kept. The rest of the model runs as it is, at every step. With `cut="output"` the model's outputs are kept
    instead, and a reused step runs nothing of the model; its blocks are looked for only where they are measured or compiled.
    """

    compiles = "each block"

    def __init__(self, model: nn.Module, config: CacheConfig, verify: Verify = "bitwise", ranks: Ranks | None = None) -> None:
        """Wrap a model; its blocks are found at the first call. `ranks` take the same decisions.

        Raises:
            ConfigError: A setting needs a graph.
            StateError: The settings were calibrated for another model.
        """
        super().__init__(model)
        _check(model, config)
        self.cache_config, self._verify, self._ranks = config, verify, ranks
        self._contexts = ContextTable(OpaqueContext)
        self._runner = ModelRunner(model)
        self._measured: tuple[str, ...] = ()
        self._seal()

    def __repr__(self) -> str:
        """Say what it wraps, which blocks were found, and which share of the work a reused step skips."""
        name, config, found = type(self._original).__name__, self.cache_config, self._runner.found
        said = f"OpaqueModel({name}, policy={config.policy!r}, reuse={config.reuse!r}, "
        if config.cut == "output":
            return said + "cut='output')"
        if found is None:
            return said + "no blocks found yet)"
        return said + f"{len(found.paths)} blocks cached: {found.share:.1%} of the work)"

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        """Copy or pickle the model and the settings; the copy finds its blocks anew and starts without state."""
        return OpaqueModel, (self._original, self.cache_config, self._verify, self._ranks)

    def with_settings(self, config: CacheConfig) -> OpaqueModel:
        """Return another cached model of the same model: its settings, blocks and contexts are its own.

        Raises:
            ConfigError: A setting needs a graph.
            StateError: The settings were calibrated for another model.
        """
        return OpaqueModel(self._original, config, self._verify, self._ranks)

    @property
    def cached_blocks(self) -> tuple[str, ...]:
        """Paths of the blocks, in the order in which they run; none where the model's outputs are kept and no block is measured.

        Raises:
            StateError: The model was not called yet.
        """
        if self._runner.found is not None:
            return self._runner.found.paths
        if self._runner.needs_blocks(self.cache_config):
            raise StateError("the blocks are found at the first call of the model, and it was not called yet.")
        return ()

    # -- calling -------------------------------------------------------------------------------------------------

    def prepare(self, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> None:
        """Find the blocks for inputs like these, and compare a guarded step with the model, now instead of at the first call."""
        self(*args, **(kwargs or {}))
        self.reset()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run one denoising step; takes and returns what the original takes and returns.

        Raises:
            CaptureError: At the first call: no modules repeat, or the model returns what cannot be kept.
            ConfigError: The settings do not fit what the model returns, or the policy needs the number of steps.
            UnsupportedGraphError: A block writes in place to what it is given, or with `cut="output"` the model does.
            StateError: The context is in use, the model is in training mode, or `torch.compile` was called on it; or a reused step calls
                other blocks than the last computed step did, and there are other ranks.
        """
        self._check_call()
        config = self.cache_config
        info = self._contexts.info(config.calls_per_step)
        context = self._contexts.enter(info)
        try:
            with torch.no_grad():
                looks = self._runner.found is None and self._runner.needs_blocks(config)
                run = self._first_step if looks else functools.partial(self._step, ALONE)
                outputs, step, state, record = run(context, info, config, args, kwargs)
                event = self._finish(context, step, state, record)
        finally:
            context.lock.release()
        if event is not None:
            self._contexts.listeners.tell(event)
        return outputs

    def _first_step(
        self, context: OpaqueContext, info: StepInfo, config: CacheConfig, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, OpaqueStep, OpaqueState, RawStep]:
        """Run a step at which the blocks are looked for, on all ranks or on none; see `_step`."""
        try:
            with Agreement(type(self._original).__name__, self._ranks).to_the_end() as agreement:
                return self._step(agreement, context, info, config, args, kwargs)
        except BaseException:
            self._runner.forget()  # they are compared with the model once more
            raise

    def _step(
        self,
        agreement: Agreement,
        context: OpaqueContext,
        info: StepInfo,
        config: CacheConfig,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any, OpaqueStep, OpaqueState, RawStep]:
        """Run a step; return the model's output, the step, the state after it, and what a report says of it."""
        step, expected = self._begin(context, info, config, args, kwargs)
        agreement.joint(None)  # before the model's collectives run again
        computed = not step.state.cursor.reuses
        if not computed:
            try:
                outputs = self._reuse(step, args, kwargs)
                state, change = dataclasses.replace(step.state, cursor=step.state.cursor.reused()), None
            except CallsChanged as changed:
                if self._ranks is not None:
                    raise StateError(
                        f"{changed}. Other ranks may have reused step {step.advance.step} meanwhile, so it is not computed here."
                        " Call cached.reset() on all ranks."
                    ) from None
                why = f"{changed}, so step {step.advance.step} was computed"
                warn(f"{type(self._original).__name__}: {why}.")
                computed, step = True, step.afresh(why)
        if computed:
            outputs, calls, features = self._compute(step, args, kwargs)
            state, change = computed_state(config, step.state, calls, features, step.moment, self._ranks)
            self._measured = tuple(map(str, features))
        wrong = difference(expected, flat_outputs(outputs), self._verify == "close") if expected is not None and self._verify else None
        wrong = agreement.joint(wrong)
        if wrong is not None:
            raise CaptureError(f"{type(self._original).__name__} with guarded blocks returns something else than by itself: {wrong}.")
        return outputs, step, state, RawStep(step.advance.step, computed, step.state.cursor.computed_at < 0, change)

    def _begin(
        self, context: OpaqueContext, info: StepInfo, config: CacheConfig, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[OpaqueStep, list[Any] | None]:
        """Decide what a call is, and find the blocks where they are needed. Nothing of its context changes before it has succeeded.

        Returns:
            The step, and what the model returned where it was just run to find its blocks.
        """
        flat, spec = pytree.tree_flatten((args, kwargs))
        num_steps, times = config.steps_of(info.num_steps), time_inputs(numbers_as_tensors(flat))
        read = times if info.step_index is None else {}
        advance = context.tracker.advance(info, signature_of(flat, spec), read, num_steps, self._contexts.latest(info.group))
        if config.decide == "joint" and not advance.began:
            synchronize_decisions(context, self._contexts.deciding(), config, num_steps)
        reuses = not advance.began and context.state is not None and context.state.cursor.at(advance.step).reuses
        version = self._runner.look(reuses)
        state, events = state_for(context, advance, version, self._runner.changed)
        if config.timesteps is not None and not state.cursor.reuses:
            check_time(advance.step, config.timesteps, times.values())
        expected = None if state.cursor.reuses else self._runner.find(config, args, kwargs)
        return OpaqueStep(config, advance, state, moment_of(flat, advance.step, num_steps), version, events), expected

    def _finish(self, context: OpaqueContext, step: OpaqueStep, state: OpaqueState, record: RawStep) -> StepEvent | None:
        """Keep what a step left, and return what callbacks are told of it."""
        num_steps = step.moment.num_steps
        if record.fresh:  # what was decided together before belongs to another cache
            context.release()
        context.state, context.version, context.state_bytes = state, step.version, state.bytes
        event = self._contexts.succeed(context, step.advance, step.state.cursor, record, step.events, num_steps)
        if num_steps is not None and step.advance.step == num_steps - 1:
            context.release()
            warn_without_reuse(context, step.config)
        return event

    def _compute(
        self, step: OpaqueStep, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Mapping[CallPlace, BlockCall], Mapping[CallPlace, Tensor]]:
        """Run every block; return the model's output, the calls that are kept, and what is measured."""
        config, runner = step.config, self._runner
        if config.cut == "blocks":
            calls = ComputeCalls()
            outputs = runner.guarded(calls, *args, **kwargs)
            return outputs, calls.done, features_of(config, calls.done, self._ranks)
        measured = MeasuredCalls(config, self._ranks)
        run = functools.partial(runner.guarded, measured) if runner.needs_blocks(config) else runner.plain
        outputs, kept = computed_output(config, type(self._original).__name__, run, args, kwargs)
        return outputs, kept, measured.features()

    def _reuse(self, step: OpaqueStep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run no block, and with the anchors at the model's output nothing of it.

        Raises:
            CallsChanged: The model calls its blocks differently than at the last computed step.
        """
        if step.config.cut == "output":
            return reused_output(step.config, step.state, step.moment)
        calls = ReuseCalls(step.state.calls, ReusedOutputs(step.config, step.state, step.moment))
        outputs = self._runner.guarded(calls, *args, **kwargs)
        calls.check_complete()
        return outputs

    # -- life ----------------------------------------------------------------------------------------------------

    def configure(self, config: CacheConfig | Mapping[str, Any] | None = None, /, **changes: Any) -> None:
        """Change settings, or replace them all; where they change what is kept, every context begins a new generation.

        Raises:
            ConfigError: A value is bad, or needs a graph. The settings stay what they were.
            StateError: The settings were calibrated for another model.
        """
        new = self.cache_config.updated(config, changes)
        _check(self._original, new)
        if new.graph_settings != self.cache_config.graph_settings:
            self._contexts.clear()
        if new.cut != self.cache_config.cut:
            self._runner.forget()
        self.cache_config = new

    def invalidate(self) -> None:
        """Take the weights for changed: each context drops what it cached at its next call and keeps its step."""
        self._runner.touch()

    def close(self) -> None:
        """Free every cache. The original model is as it was."""
        self._contexts.clear()
        self._runner.forget()

    def compile(self, **options: Any) -> None:
        """Compile each block with `torch.compile(**options)`; what is around the blocks stays as it is."""
        self._runner.compile(options)

    def report(self) -> Report:
        """Return what each context did in its current generation. Reads the indicator from the device."""
        return Report(self._contexts.reports(self.cache_config), self._measured)

    def _touched(self) -> None:
        self._runner.suspect()


def _check(model: nn.Module, config: CacheConfig) -> None:
    """Refuse settings that need a graph, or that were calibrated for another model."""
    config.check_guard("host")
    if config.graph_settings.way.needs_source:
        raise ConfigError(
            f"reuse={config.reuse!r} needs the graph, which shows what input each output continues, and a model that is captured as"
            " opaque has none. Use reuse='output', 'taylor' or 'linear'."
        )
    if config.batch_reduce != "joint":
        raise ConfigError(
            f"batch_reduce={config.batch_reduce!r} needs the graph, which shows where the samples of a batch are, and a model that is"
            " captured as opaque has none. Use batch_reduce='joint'."
        )
    if config.compute_first or config.compute_last:
        raise ConfigError("a model that is captured as opaque has no order of blocks: leave out compute_first and compute_last.")
    check_calibration(model, config, "captured as opaque")
