"""The cached model of a model that no graph can be made of: its own Python runs, and the calls of its blocks are guarded."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bwcache_compile.clock import check_time
from bwcache_compile.config import CacheConfig
from bwcache_compile.contexts import ContextTable
from bwcache_compile.errors import CaptureError, ConfigError, StateError, warn
from bwcache_compile.ir.compare import Verify, difference, flat_outputs
from bwcache_compile.ir.torch_compat import pytree
from bwcache_compile.ir.work_share import WARN_ABOVE
from bwcache_compile.opaque.blocks import FoundBlocks, find_blocks
from bwcache_compile.opaque.cache import OpaqueState, ReusedOutputs, computed_state
from bwcache_compile.opaque.guards import CallsChanged, ComputeCalls, Guard, ReuseCalls, StepCalls
from bwcache_compile.opaque.step import OpaqueContext, OpaqueStep, moment_of, numbers_as_tensors, signature_of, state_for
from bwcache_compile.region.calls import record
from bwcache_compile.region.copies import with_modules, write_back
from bwcache_compile.region.uncaptured import UncapturedModel
from bwcache_compile.report import RawStep, Report
from bwcache_compile.runtime.context import time_inputs, warn_without_reuse
from bwcache_compile.runtime.watch import ModelWatch
from bwcache_compile.step_events import StepEvent, step_event
from bwcache_compile.stepping import StepInfo

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class OpaqueModel(UncapturedModel):
    """A drop-in for a model of which no graph can be made. Made by `transform(model, capture="opaque")`.

    At its first call the model runs once while the calls of the modules in its lists are written down; those that do most of the
    work are its blocks. At a computed step each block runs and its output is kept; at a reused step no block runs, and each of its
    calls returns what is kept. The rest of the model runs as it is, at every step.
    """

    compiles = "each block"

    def __init__(
        self, model: nn.Module, config: CacheConfig, verify: Verify = "bitwise", process_group: ProcessGroup | None = None
    ) -> None:
        """Wrap a model; its blocks are found at the first call. The ranks of `process_group` take the same decisions.

        Raises:
            ConfigError: A setting needs a graph.
        """
        super().__init__(model)
        _check(config)
        self.cache_config, self._verify, self._group = config, verify, process_group
        self._contexts = ContextTable(OpaqueContext)
        self._found: FoundBlocks | None = None
        self._found_in = -1
        self._watch = ModelWatch(model)
        self._lock = threading.RLock()
        self._compiled: dict[str, Callable[..., Any]] = {}
        self._compile_options: dict[str, Any] | None = None
        self._measured: tuple[str, ...] = ()
        self._seal()

    def __repr__(self) -> str:
        """Say what it wraps, which blocks were found, and which share of the work a reused step skips."""
        name, config = type(self._original).__name__, self.cache_config
        said = f"OpaqueModel({name}, policy={config.policy!r}, reuse={config.reuse!r}, "
        if self._found is None:
            return said + "no blocks found yet)"
        return said + f"{len(self._found.paths)} blocks cached: {self._found.share:.1%} of the work)"

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        """Copy or pickle the model and the settings; the copy finds its blocks anew and starts without state."""
        return OpaqueModel, (self._original, self.cache_config, self._verify, self._group)

    @property
    def cached_blocks(self) -> tuple[str, ...]:
        """Paths of the blocks, in the order in which they run.

        Raises:
            StateError: The model was not called yet.
        """
        if self._found is None:
            raise StateError("the blocks are found at the first call of the model, and it was not called yet.")
        return self._found.paths

    # -- calling -------------------------------------------------------------------------------------------------

    def prepare(self, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> None:
        """Find the blocks for inputs like these, and compare a guarded step with the model, now instead of at the first call."""
        self(*args, **(kwargs or {}))
        self.reset()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run one denoising step; takes and returns what the original takes and returns.

        Raises:
            CaptureError: At the first call: no modules repeat.
            UnsupportedGraphError: A block writes in place to what it is given.
            StateError: The context is in use, the model is in training mode, or `torch.compile` was called on it; or a reused step calls
                other blocks than the last computed step did, and there are other ranks.
        """
        self._check_call()
        config = self.cache_config
        info = self._contexts.info(config.calls_per_step)
        context = self._contexts.enter(info)
        try:
            with torch.no_grad():
                outputs, event = self._step(context, info, config, args, kwargs)
        finally:
            context.lock.release()
        if event is not None:
            self._contexts.listeners.tell(event)
        return outputs

    def _step(self, context: OpaqueContext, info: StepInfo, config: CacheConfig, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a step; return the model's output, and what callbacks are told."""
        step, expected = self._begin(context, info, config, args, kwargs)
        computed = not step.state.cursor.reuses
        if not computed:
            try:
                outputs, state, change = self._reuse(step, args, kwargs)
            except CallsChanged as changed:
                if self._group is not None:
                    raise StateError(
                        f"{changed}. Other ranks may have reused step {step.advance.step} meanwhile, so it is not computed here."
                        " Call cached.reset() on all ranks."
                    ) from None
                why = f"{changed}, so step {step.advance.step} was computed"
                warn(f"{type(self._original).__name__}: {why}.")
                computed, step = True, step.afresh(why)
        if computed:
            outputs, state, change = self._compute(step, args, kwargs)
        wrong = difference(expected, flat_outputs(outputs), self._verify == "close") if expected is not None and self._verify else None
        if wrong is not None:
            raise CaptureError(f"{type(self._original).__name__} with guarded blocks returns something else than by itself: {wrong}.")
        return outputs, self._finish(context, step, state, RawStep(step.advance.step, computed, step.state.cursor.computed_at < 0, change))

    def _begin(
        self, context: OpaqueContext, info: StepInfo, config: CacheConfig, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[OpaqueStep, list[Any] | None]:
        """Decide what a call is, and find the blocks where they are not known. Nothing of its context changes before it has succeeded.

        Returns:
            The step, and what the model returned where it was just run to find its blocks.
        """
        flat, spec = pytree.tree_flatten((args, kwargs))
        num_steps, times = config.steps_of(info.num_steps), time_inputs(numbers_as_tensors(flat))
        read = times if info.step_index is None else {}
        advance = context.tracker.advance(info, signature_of(flat, spec), read, num_steps, self._contexts.latest(info.group))
        reuses = not advance.began and context.state is not None and context.state.cursor.at(advance.step).reuses
        expected = None
        with self._lock:
            self._watch.glance() if reuses else self._watch.poll()
            if self._found is None or self._found_in != self._watch.structure:
                expected = self._find(args, kwargs)
            version = (self._watch.structure, self._watch.weights)
        state, events = state_for(context, advance, version, self._watch.changed)
        if config.timesteps is not None and not state.cursor.reuses:
            check_time(advance.step, config.timesteps, times.values())
        return OpaqueStep(config, advance, state, moment_of(flat, advance.step, num_steps), version, events), expected

    def _finish(self, context: OpaqueContext, step: OpaqueStep, state: OpaqueState, record: RawStep) -> StepEvent | None:
        """Keep what a step left, and return what callbacks are told of it."""
        num_steps = step.moment.num_steps
        context.state, context.version, context.state_bytes = state, step.version, state.bytes
        self._contexts.succeed(context, step.advance, record, step.events)
        event = None
        if self._contexts.listeners:
            event = step_event(context.name, context.entered, num_steps, step.advance, step.state.cursor, record, step.events, False)
        if num_steps is not None and step.advance.step == num_steps - 1:
            context.state = None
            warn_without_reuse(context, step.config)
        return event

    def _compute(self, step: OpaqueStep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, OpaqueState, Tensor | None]:
        """Run every block."""
        calls = ComputeCalls()
        outputs = self._run(calls, args, kwargs)
        state, change = computed_state(step.config, step.state, calls.done, step.moment, self._group)
        self._measured = tuple(map(str, state.references))
        return outputs, state, change

    def _reuse(self, step: OpaqueStep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, OpaqueState, None]:
        """Run no block.

        Raises:
            CallsChanged: The model calls its blocks differently than at the last computed step.
        """
        calls = ReuseCalls(step.state.calls, ReusedOutputs(step.config, step.state, step.moment))
        outputs = self._run(calls, args, kwargs)
        calls.check_complete()
        return outputs, dataclasses.replace(step.state, cursor=step.state.cursor.reused()), None

    def _run(self, calls: StepCalls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model's Python with guards in the places of its blocks."""
        numbers: Counter[str] = Counter()
        guards = {}
        for path in self.cached_blocks:
            block = self._original.get_submodule(path)
            guards[path] = Guard(block, path, self._runnable(path, block), calls, numbers)
        copies = with_modules(self._original, guards)
        returned = copies[""](*args, **kwargs)
        write_back(self._original, copies)
        with self._lock:
            self._watch.accept_changes()
        return returned

    def _runnable(self, path: str, block: nn.Module) -> Callable[..., Any]:
        """Return what runs a block."""
        if self._compile_options is None:
            return block
        compiled = self._compiled.get(path)
        if compiled is None or getattr(compiled, "_orig_mod", None) is not block:
            compiled = self._compiled[path] = torch.compile(block, **self._compile_options)
        return compiled

    def _find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Find the blocks on a run of the model, and return the leaves of what it returned.

        Raises:
            CaptureError: There are none.
        """
        name = type(self._original).__name__
        recording = record(self._original, args, kwargs)
        found = find_blocks(recording)
        if not found.paths:
            raise CaptureError(
                f"{name} has no blocks: at no call of it are several modules of one torch.nn.ModuleList, ModuleDict or Sequential called"
                " that multiply matrices. Hold the blocks in a torch.nn.ModuleList."
            )
        if 1 - found.share > WARN_ABOVE:
            left_out = "".join(f"\n  {reason}" for reason in found.left_out)
            warn(f"a reused step of {name} still runs {1 - found.share:.0%} of the work outside its cached blocks.{left_out}")
        self._watch.accept_changes()
        self._found, self._found_in = found, self._watch.structure
        self._compiled.clear()
        return recording.outputs

    # -- life ----------------------------------------------------------------------------------------------------

    def configure(self, config: CacheConfig | Mapping[str, Any] | None = None, /, **changes: Any) -> None:
        """Change settings, or replace them all; where they change what is kept, every context begins a new generation.

        Raises:
            ConfigError: A value is bad, or needs a graph. The settings stay what they were.
        """
        new = self._changed_settings(config, changes)
        _check(new)
        if new.graph_settings != self.cache_config.graph_settings:
            self._contexts.clear()
        self.cache_config = new

    def invalidate(self) -> None:
        """Take the weights for changed: each context drops what it cached at its next call and keeps its step."""
        with self._lock:
            self._watch.weights += 1
            self._watch.suspect()

    def close(self) -> None:
        """Free every cache. The original model is as it was."""
        self._contexts.clear()
        self._compiled.clear()

    def compile(self, **options: Any) -> None:
        """Compile each block with `torch.compile(**options)`; what is around the blocks stays as it is."""
        self._compile_options = options
        self._compiled.clear()

    def report(self) -> Report:
        """Return what each context did in its current generation. Reads the indicator from the device."""
        return Report(self._contexts.reports(self.cache_config), self._measured)

    def _touched(self) -> None:
        self._watch.suspect()


def _check(config: CacheConfig) -> None:
    """Refuse settings that need a graph."""
    config.check_guard("host")
    way = config.graph_settings.way
    if config.cut == "output":
        raise ConfigError('a model that is captured as opaque is cut at its blocks, got cut="output".')
    if way.needs_source:
        raise ConfigError(
            f"reuse={config.reuse!r} needs the graph, which shows what input each output continues, and a model that is captured as"
            " opaque has none. Use reuse='output', 'taylor' or 'linear'."
        )
    if config.decide == "joint":
        raise ConfigError('a model that is captured as opaque decides in each context by itself, got decide="joint".')
    if config.batch_reduce != "joint":
        raise ConfigError(
            f"batch_reduce={config.batch_reduce!r} needs the graph, which shows where the samples of a batch are, and a model that is"
            " captured as opaque has none. Use batch_reduce='joint'."
        )
    if config.compute_first or config.compute_last:
        raise ConfigError("a model that is captured as opaque has no order of blocks: leave out compute_first and compute_last.")
    if config.calibrated_for is not None:
        raise ConfigError("these settings were calibrated on the graph of a model, and a model that is captured as opaque has none.")
