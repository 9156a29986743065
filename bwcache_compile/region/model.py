"""The cached model of a model that cannot be captured whole: its own Python runs, and calls cached stacks of blocks."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from bwcache_compile.config import CacheConfig
from bwcache_compile.contexts import ContextTable
from bwcache_compile.errors import CaptureError, ConfigError, StateError, warn
from bwcache_compile.ir.compare import Verify, difference, flat_outputs
from bwcache_compile.ir.torch_compat import pytree
from bwcache_compile.ir.work_share import WARN_ABOVE
from bwcache_compile.region.calls import record
from bwcache_compile.region.chains import Chain, chains
from bwcache_compile.region.copies import with_modules, write_back
from bwcache_compile.region.stack import Stack
from bwcache_compile.region.stand_ins import ChainBroken, StackRun, StandIn
from bwcache_compile.region.uncaptured import UncapturedModel
from bwcache_compile.report import ContextReport, Report
from bwcache_compile.runtime import CachedModel
from bwcache_compile.runtime.context import ModelContext, time_inputs
from bwcache_compile.step_events import Handle, StepEvent
from bwcache_compile.stepping import RunStep

MakeCached = Callable[[nn.Module, CacheConfig], CachedModel]
"""Makes a cached model of a stack."""


@dataclasses.dataclass(frozen=True)
class _Held:
    """A stack of the model and its cached model."""

    chain: Chain
    cached: CachedModel


class _Heard(threading.local):
    """Steps of stacks that a thread's call of the model has run, of which callbacks are told once the call has succeeded."""

    def __init__(self) -> None:
        self.events: list[StepEvent] = []


class RegionModel(UncapturedModel):
    """A drop-in for a model whose Python cannot be captured. Made by `transform(model, capture="region")`.

    At its first call the model runs once while the calls of its blocks are written down. Where blocks hand their outputs to one
    another and to nothing else they are a stack: it is captured alone, and cached as `transform` caches a model. The rest of the model
    runs as it is, at every step.
    """

    compiles = "its stacks"

    def __init__(self, model: nn.Module, config: CacheConfig, make: MakeCached, verify: Verify = "bitwise") -> None:
        """Wrap a model; nothing is found yet.

        Raises:
            ConfigError: The settings cut at the model's output, where there is no graph.
        """
        super().__init__(model)
        _check(config)
        self.cache_config, self._make, self._verify = config, make, verify
        self._contexts = ContextTable(ModelContext)
        self._stacks: dict[str, _Held] = {}
        self._share, self._finding = 0.0, threading.RLock()
        self._source: Callable[[], RunStep | None] | None = None
        self._relays: list[Handle] = []
        self._heard = _Heard()
        self._seal()

    def __repr__(self) -> str:
        """Say what it wraps, which stacks were found, and which share of the work a reused step skips."""
        name, config = type(self._original).__name__, self.cache_config
        said = f"RegionModel({name}, policy={config.policy!r}, reuse={config.reuse!r}, "
        if not self._stacks:
            return said + "no stacks found yet)"
        ranges = (f"{stack.chain.paths[0]} .. {stack.chain.paths[-1]}" for stack in self._stacks.values())
        return said + f"{', '.join(ranges)}: {self._share:.1%} of the work)"

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        """Copy or pickle the model and the settings; the copy finds its stacks anew and starts without state."""
        return RegionModel, (self._original, self.cache_config, self._make, self._verify)

    @property
    def stacks(self) -> Mapping[str, CachedModel]:
        """The cached stacks by the path of their first block, in the order in which they run.

        Raises:
            StateError: The model was not called yet.
        """
        if not self._stacks:
            raise StateError("the stacks are found at the first call of the model, and it was not called yet.")
        return {name: stack.cached for name, stack in self._stacks.items()}

    @property
    def cached_blocks(self) -> tuple[str, ...]:
        """Paths of the blocks of all stacks, in the order in which they run.

        Raises:
            StateError: The model was not called yet.
        """
        return tuple(path for name in self.stacks for path in self._stacks[name].chain.paths)

    # -- calling -------------------------------------------------------------------------------------------------

    def prepare(self, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> None:
        """Find and capture the stacks for inputs like these now instead of at the first call."""
        with torch.no_grad():
            self._find(args, kwargs or {})
        self.reset()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run one denoising step; takes and returns what the original takes and returns.

        Raises:
            CaptureError, NoBlocksFoundError, UnsupportedGraphError: At the first call, where no stack is found or one cannot be captured.
            StateError: See `CachedModel.forward`.
        """
        self._check_call()
        self._heard.events = []
        with torch.no_grad():
            returned = self._step(args, kwargs)
        for event in self._heard.events:
            self._contexts.listeners.tell(event)
        return returned

    def _step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a step, and look for the stacks where they are not known or not what they were."""
        stacks = self._stacks
        if not stacks or not self._still_the_models(stacks):
            return self._find(args, kwargs)
        try:
            return self._run(stacks, args, kwargs)
        except ChainBroken as broken:
            warn(
                f"{type(self._original).__name__} {broken}. Its stacks are looked for again: this step is computed, and the steps count"
                " from 0 unless cache_context(..., step_index=...) says which one it is."
            )
            self._heard.events = []
            return self._find(args, kwargs)

    def _run(self, stacks: Mapping[str, _Held], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model's Python over cached stacks.

        Raises:
            ChainBroken: It does not call the blocks as it did when the stacks were found.
        """
        leaves = pytree.tree_leaves((args, kwargs))
        times = _times(leaves)
        self._relay_steps(stacks)
        info = self._contexts.info(calls_per_step=1)  # where the caller names no context, each stack numbers its own calls
        told: dict[str, Any] = {"step_index": info.step_index, "num_inference_steps": info.num_steps, "group": info.group}
        replaced: dict[str, nn.Module] = {}
        with ExitStack() as scopes:
            for stack in stacks.values():
                if info.named or info.step_index is not None:
                    scopes.enter_context(stack.cached.cache_context(info.context, **told))
                run = StackRun(stack.chain, functools.partial(_called, stack.cached, times))
                for place, path in enumerate(stack.chain.paths):
                    replaced[path] = StandIn(self._original.get_submodule(path), run, place)
            copies = with_modules(self._original, replaced)
            returned = copies[""](*args, **kwargs)
            write_back(self._original, copies)
        return returned

    def _find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Find the stacks on a run of the model, and run it once over them; both must return the same.

        Raises:
            CaptureError: There is no stack, or the model over its stacks returns something else.
        """
        name = type(self._original).__name__
        with self._finding:
            self._drop()
            recording = record(self._original, args, kwargs)
            found, reasons = chains(recording.calls)
            listed = "".join(f"\n  {reason}" for reason in dict.fromkeys(reasons))
            if not found:
                raise CaptureError(f"{name} has no stack of blocks that hand their outputs to one another and to nothing else:{listed}")
            unread = len(_times(pytree.tree_leaves((args, kwargs))))
            modules = [(chain, Stack(self._original, chain, unread)) for chain in found]
            stacks = {chain.paths[0]: _Held(chain, self._make(module, self.cache_config)) for chain, module in modules}
            for stack in stacks.values():
                stack.cached.follow(self._source)
            try:
                returned = self._run(stacks, args, kwargs)
            except ChainBroken as broken:
                raise CaptureError(f"{name} {broken}, so its blocks cannot be cached as a stack.") from None
            wrong = difference(recording.outputs, flat_outputs(returned), self._verify == "close") if self._verify else None
            if wrong is not None:
                raise CaptureError(f"{name} over its cached stacks returns something else than by itself: {wrong}.")
            self._stacks, self._share = stacks, sum(chain.work for chain in found) / max(recording.work, 1)
        if 1 - self._share > WARN_ABOVE:
            warn(f"a reused step of {name} still runs {1 - self._share:.0%} of the work outside the cached stacks:{listed}")
        return returned

    def _still_the_models(self, stacks: Mapping[str, _Held]) -> bool:
        """Whether the stacks' blocks are still the modules that the model has."""
        return all(
            stack.cached.get_submodule(path) is self._original.get_submodule(path)
            for stack in stacks.values()
            for path in stack.chain.paths
        )

    def _drop(self) -> None:
        for stack in self._stacks.values():
            stack.cached.close()
        self._stacks, self._relays = {}, []

    # -- life ----------------------------------------------------------------------------------------------------

    def configure(self, config: CacheConfig | Mapping[str, Any] | None = None, /, **changes: Any) -> None:
        """Change settings, or replace them all; see `CachedModel.configure`."""
        new = self._changed_settings(config, changes)
        _check(new)
        for stack in self._stacks.values():
            stack.cached.configure(new)
        self.cache_config = new

    def reset(self, num_steps: int | None = None) -> None:
        """Begin a new generation in every context; see `CachedModel.reset`."""
        super().reset(num_steps)
        for stack in self._stacks.values():
            stack.cached.reset()

    def drop_context(self, name: str, *, group: str = "") -> None:
        """Free the cache of one context; see `CachedModel.drop_context`."""
        for stack in self.stacks.values():
            stack.drop_context(name, group=group)

    def follow(self, source: Callable[[], RunStep | None] | None) -> None:
        """Take the run and the step of each call from the loop that makes the calls; see `CachedModel.follow`."""
        self._source = source
        for stack in self._stacks.values():
            stack.cached.follow(source)

    def on_step(self, callback: Callable[[StepEvent], None]) -> Handle:
        """Call a function after each step of each context; with several stacks, of each stack: `cond (blocks.0)`.

        See `CachedModel.on_step`.
        """
        return self._contexts.listeners.add(callback)

    def _relay_steps(self, stacks: Mapping[str, _Held]) -> None:
        """Hear of the stacks' steps while a callback is registered."""
        if bool(self._relays) == bool(self._contexts.listeners):
            return
        for handle in self._relays:
            handle.remove()
        wanted = stacks.items() if self._contexts.listeners else ()
        self._relays = [stack.cached.on_step(functools.partial(self._hear, _suffix(stacks, name))) for name, stack in wanted]

    def _hear(self, suffix: str, event: StepEvent) -> None:
        """Take a step of a stack."""
        self._heard.events.append(dataclasses.replace(event, context=event.context + suffix))

    def invalidate(self) -> None:
        """Take the weights for changed; see `CachedModel.invalidate`."""
        for stack in self._stacks.values():
            stack.cached.invalidate()

    def close(self) -> None:
        """Free every program and state. The original model is as it was."""
        self._drop()

    def compile(self, **options: Any) -> None:
        """Compile each stack's graphs with `torch.compile(**options)`; the model's own Python stays as it is."""
        for stack in self.stacks.values():
            stack.compile(**options)

    def report(self) -> Report:
        """Return what each context did in its current generation; with several stacks, what each of them did: `cond (blocks.0)`."""
        contexts: dict[str, ContextReport] = {}
        blocks: list[str] = []
        captures = 0
        for name, stack in self._stacks.items():
            report = stack.cached.report()
            blocks += report.blocks
            captures += report.captures
            for context, done in report.contexts.items():
                shown = context + _suffix(self._stacks, name)
                contexts[shown] = dataclasses.replace(done, name=shown)
        return Report(contexts, tuple(blocks), captures)


def _times(leaves: list[Any]) -> list[Tensor]:
    """Return the inputs of a call that may be the time."""
    return [leaves[at] for at in time_inputs(leaves) if isinstance(at, int)]


def _suffix(stacks: Mapping[str, _Held], name: str) -> str:
    """Return what tells the contexts of a stack from those of the others."""
    return "" if len(stacks) == 1 else f" ({name})"


def _called(stack: CachedModel, times: Sequence[Tensor], given: Sequence[Tensor]) -> Sequence[Any]:
    """Run one step of a cached stack."""
    outputs: Sequence[Any] = stack(*times, *given)
    return outputs


def _check(config: CacheConfig) -> None:
    if config.cut == "output":
        raise ConfigError('a model that is captured by region is cut at its blocks, got cut="output".')
    if config.batch_reduce == "per_sample":
        raise ConfigError(
            "a model that is captured by region calls its stacks with whole batches, got batch_reduce='per_sample'. Use"
            " batch_reduce='max' or 'joint'."
        )
