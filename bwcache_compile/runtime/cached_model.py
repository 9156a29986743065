"""The cached model: called like the original, it computes or reuses, and keeps one state per context."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bwcache_compile.config import CacheConfig
from bwcache_compile.contexts import ContextTable
from bwcache_compile.errors import warn
from bwcache_compile.ir.compare import Verify
from bwcache_compile.ir.plan import CachePlan
from bwcache_compile.ir.ranks import Ranks
from bwcache_compile.ir.torch_compat import pytree
from bwcache_compile.report import Report
from bwcache_compile.runtime.context import ModelContext
from bwcache_compile.runtime.drop_in import DropIn
from bwcache_compile.runtime.fingerprint import check_calibrated
from bwcache_compile.runtime.frames import call_directly, left_out
from bwcache_compile.runtime.functional import first_state, functional_step
from bwcache_compile.runtime.graph_methods import GraphMethods
from bwcache_compile.runtime.programs import ProgramCache
from bwcache_compile.runtime.row_methods import RowMethods
from bwcache_compile.runtime.sample_step import SampleStepper
from bwcache_compile.runtime.signature import Parameters
from bwcache_compile.runtime.state import CacheState, GuardedState
from bwcache_compile.runtime.step import Stepper
from bwcache_compile.runtime.trial import Toolchain
from bwcache_compile.runtime.warm_up import run_all
from bwcache_compile.stepping import StepInfo

_NO_MODE = contextlib.nullcontext()


class CachedModel(GraphMethods, DropIn, RowMethods):
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
        self._contexts = ContextTable(ModelContext)
        self._stepper = Stepper(model, self._call_parameters, self._programs, self._contexts)
        self._samples = SampleStepper(model, self._call_parameters, self._programs, self._contexts)
        self._bypassed = False
        self._seal()

    def __repr__(self) -> str:
        """Say what it wraps, what is captured, and what is cached; the modules are those of the original."""
        name, config = type(self._original).__name__, self.cache_config
        said = f"CachedModel({name}, policy={config.policy!r}, reuse={config.reuse!r}, guard={self._toolchain.guard!r}, "
        if self._programs.closed:
            return said + "closed)"
        count = len(self._programs)
        if not count:
            return said + "not captured yet)"
        return said + f"{len(self.plan.blocks)} blocks cached, {count} program{'s' * (count > 1)})"

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        """Copy or pickle the model and the settings; the copy captures anew and starts without state."""
        return CachedModel, (self._original, self.cache_config, self._toolchain, self._dynamic_shapes, self._verify)

    @property
    def guard(self) -> str:
        """Who decides at each step: "host" or "graph"."""
        return self._toolchain.guard

    @property
    def ranks(self) -> Ranks | None:
        """The ranks that decide together with this one; None without a process group."""
        return self._toolchain.ranks

    def with_settings(self, config: CacheConfig) -> CachedModel:
        """Return another cached model of the same model: its settings, programs and contexts are its own.

        Raises:
            ConfigError: The settings do not fit the guard.
        """
        config.check_guard(self._toolchain.guard)
        return CachedModel(self._original, config, self._toolchain, self._dynamic_shapes, self._verify)

    def _touched(self) -> None:
        self._programs.suspect()

    # -- programs ------------------------------------------------------------------------------------------------

    def prepare(self, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> CachePlan:
        """Capture the model for inputs like these now instead of at the first call, and return the plan."""
        return self._programs.match(*self._call_parameters.bind(args, kwargs or {}), self.cache_config).runnable.plan

    @property
    def call_parameters(self) -> tuple[str, ...]:
        """Names of what the model's forward takes by position, in order."""
        parameters = inspect.signature(self._original.forward).parameters.values()
        return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))

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
        if self.cache_config.batch_reduce == "per_sample":
            return self._batch_step(args, kwargs)
        stepper = self._stepper
        call = stepper.begin(args, kwargs, self.cache_config)
        try:
            # entering the mode once more, inside a pipeline's, would cost as much as a small operator
            with torch.no_grad() if torch.is_grad_enabled() else _NO_MODE:
                # the graph is the only frame that an outer torch.compile compiles
                runnable = call.match.runnable
                returned = call.first if call.first is not None else call_directly(runnable.graph(call.kind), call.operands)
            outputs = stepper.finish(call, returned, call.first is None and runnable.replays())
        finally:
            stepper.end(call)
        if call.told is not None:
            stepper.tell(call.told)
        return outputs

    # -- the functional form -------------------------------------------------------------------------------------

    def init_state(self, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> CacheState | GuardedState:
        """Return the state of a fresh context for inputs like these, capturing the model if need be.

        Raises:
            ConfigError: The samples of a batch decide by themselves.
        """
        self._check_functional()
        return first_state(self._programs.match(*self._call_parameters.bind(args, kwargs or {}), self.cache_config))

    def policy_parameters(self, **changes: Any) -> tuple[Tensor, ...]:
        """Return the policy's inputs for `functional_step`, from the settings with some of them changed.

        Raises:
            ConfigError: A value is bad, or the setting is built into the graphs.
        """
        config = self.cache_config.changed(**changes)
        config.check_guard(self._toolchain.guard)
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
            ConfigError: The samples of a batch decide by themselves.
            StateError: The state belongs to other inputs.
        """
        self._check_functional()
        args, kwargs = self._call_parameters.bind(args, kwargs)
        return functional_step(self._programs, self.cache_config, args, kwargs, state, parameters)

    # -- life ----------------------------------------------------------------------------------------------------

    def _unused(self, info: StepInfo) -> None:
        """Warn once that calls go around the cached model."""
        if not self._bypassed:
            self._bypassed = True
            warn(
                f"the block `with cache_context({info.context!r})` ended without a call of the cached model, so nothing was cached."
                " Call the result of transform instead of the original model."
            )

    def configure(self, config: CacheConfig | Mapping[str, Any] | None = None, /, **changes: Any) -> None:
        """Change settings, or replace them all by a `CacheConfig`.

        Those that are inputs of the graphs (thresholds, a mask, weights) take effect at the next computed step and recompile nothing.
        Those that shape the graphs (`CacheConfig.graph_settings`) make the graphs anew from what is captured already, and every
        context begins a new generation.

        Raises:
            ConfigError, UnsupportedGraphError: A value is bad or does not fit the model. The settings stay what they were.
            StateError: The settings were calibrated for another model.
        """
        new = self.cache_config.updated(config, changes)
        new.check_guard(self._toolchain.guard)
        check_calibrated(self._original, new)
        if new.graph_settings != self.cache_config.graph_settings:
            self._programs.rebuild(new)
            self._contexts.clear()
        self._programs.judge(new)
        self.cache_config = new

    def decide_with(self, other: CachedModel) -> None:
        """Let the contexts of two cached models, which are parts of one model, decide together where `decide="joint"`."""
        self._contexts.join(other._contexts)

    def restore_point(self) -> Callable[[], None]:
        """Return what undoes the steps that this thread runs from here on, for a model of which this one is a part and which fails."""
        return self._contexts.restore_point()

    def invalidate(self) -> None:
        """Take the weights for changed: each context drops what it cached at its next call and keeps its step.

        For weights that were edited where no version counts it.
        """
        self._programs.touch()

    def close(self) -> None:
        """Free every program and state. The original model is as it was."""
        self._programs.close()
        self._contexts.clear()

    def warm_up(self, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> None:
        """Run every graph once for inputs like these, so that whatever compiles does so now. No state is touched.

        With `batch_reduce="per_sample"` they run at each batch size that samples of such a batch may need.
        """
        if self.cache_config.batch_reduce == "per_sample":
            return self._warm_up_batch(args, kwargs or {})
        args, kwargs = self._call_parameters.bind(args, kwargs or {})
        match = self._programs.match(args, kwargs, self.cache_config)
        num_steps = self.cache_config.steps or 2
        parameters = match.runnable.parameters(self.cache_config, num_steps)
        with self._programs.gate.running():
            run_all(match.runnable, pytree.tree_leaves((args, kwargs)), match.runnable.fresh(match.sizes), parameters)

    def report(self) -> Report:
        """Return what each context did in its current generation. Reads the indicator from the device."""
        blocks = tuple(m.block for m in self.plan.measured) if len(self._programs) else ()
        return Report(self._contexts.reports(self.cache_config), blocks, self._programs.captured)
