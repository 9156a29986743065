"""The cached model of a model that cannot be captured whole: its own Python runs, and calls cached stacks of blocks."""

from __future__ import annotations

import dataclasses
import functools
import operator
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import nn

from bwcache_compile.config import CacheConfig
from bwcache_compile.context import Context
from bwcache_compile.contexts import ContextTable
from bwcache_compile.errors import ConfigError, StateError, warn
from bwcache_compile.ir.compare import Verify
from bwcache_compile.ir.ranks import Agreement
from bwcache_compile.region.parts_report import parts_report, suffix
from bwcache_compile.region.stacks import HeldStack, Maker, Stacks, enter_context, found_stacks
from bwcache_compile.region.stand_ins import ChainBroken
from bwcache_compile.region.uncaptured import UncapturedModel, check_calibration
from bwcache_compile.report import Report
from bwcache_compile.runtime import CachedModel
from bwcache_compile.step_events import Handle, StepEvent
from bwcache_compile.stepping import RunStep

AnyPart = TypeVar("AnyPart", CachedModel, UncapturedModel)


class _Heard(threading.local):
    """Steps of stacks that a thread's call of the model has run, of which callbacks are told once the call has succeeded."""

    def __init__(self) -> None:
        self.events: list[StepEvent] = []


class RegionModel(UncapturedModel):
    """A drop-in for a model whose Python cannot be captured. Made by `transform(model, capture="region")`.

    At its first call the model runs once while the calls of its blocks are written down. Where blocks hand their outputs to one
    another and to nothing else they are a stack: it is captured alone, and cached as `transform` caches a model. The rest of the model
    runs as it is, at every step. With `cut="output"` the model's outputs are kept instead: no stack is captured, and a reused step
    runs nothing of the model.
    """

    compiles = "its stacks"

    def __init__(self, model: nn.Module, config: CacheConfig, make: Maker, verify: Verify = "bitwise") -> None:
        """Wrap a model; nothing is found yet.

        Raises:
            ConfigError: The settings were calibrated with the anchors at the blocks of a whole graph.
            StateError: They were calibrated for another model.
        """
        super().__init__(model)
        _check(model, config)
        self.cache_config, self._make, self._verify = config, make, verify
        self._contexts = ContextTable(Context)
        self._source: Callable[[], RunStep | None] | None = None
        self._compiles: Callable[[CachedModel | UncapturedModel], None] | None = None
        self._stacks: Stacks | None = None
        self._parts: Mapping[str, CachedModel | UncapturedModel] = self._first_parts(config)
        self._finding = threading.RLock()
        self._relays: list[Handle] = []
        self._heard = _Heard()
        self._seal()

    def __repr__(self) -> str:
        """Say what it wraps, which stacks were found, and which share of the work a reused step skips."""
        name, config = type(self._original).__name__, self.cache_config
        said = f"RegionModel({name}, policy={config.policy!r}, reuse={config.reuse!r}, "
        if config.cut == "output":
            return said + "cut='output')"
        if self._stacks is None:
            return said + "no stacks found yet)"
        ranges = (f"{stack.chain.paths[0]} .. {stack.chain.paths[-1]}" for stack in self._stacks.held.values())
        return said + f"{', '.join(ranges)}: {self._stacks.share:.1%} of the work)"

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        """Copy or pickle the model and the settings; the copy finds its stacks anew and starts without state."""
        return RegionModel, (self._original, self.cache_config, self._make, self._verify)

    def with_settings(self, config: CacheConfig) -> RegionModel:
        """Return another cached model of the same model: its settings, stacks and contexts are its own.

        Raises:
            ConfigError, StateError: See `__init__`.
        """
        return RegionModel(self._original, config, self._make, self._verify)

    @property
    def stacks(self) -> Mapping[str, CachedModel]:
        """The cached stacks by the path of their first block, in the order in which they run; none with `cut="output"`.

        Raises:
            StateError: The model was not called yet.
        """
        return {name: stack.cached for name, stack in self._found().items()}

    @property
    def cached_blocks(self) -> tuple[str, ...]:
        """Paths of the blocks of all stacks, in the order in which they run; none with `cut="output"`.

        Raises:
            StateError: The model was not called yet.
        """
        return tuple(path for stack in self._found().values() for path in stack.chain.paths)

    def _found(self) -> Mapping[str, HeldStack]:
        if self._stacks is None and self.cache_config.cut == "blocks":
            raise StateError("the stacks are found at the first call of the model, and it was not called yet.")
        return {} if self._stacks is None else self._stacks.held

    def _first_parts(self, config: CacheConfig) -> dict[str, CachedModel | UncapturedModel]:
        """Return what is cached before the first call: with the anchors at the output the whole model, else no stack yet."""
        if config.cut == "blocks":
            return {}
        return {"": self._ready(self._make.whole(self._original, config))}

    def _ready(self, part: AnyPart) -> AnyPart:
        """Give a new part what was said before of all of them."""
        part.follow(self._source)
        if self._compiles is not None:
            self._compiles(part)
        return part

    # -- calling -------------------------------------------------------------------------------------------------

    def prepare(self, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> None:
        """Find and capture the stacks for inputs like these now instead of at the first call."""
        if self.cache_config.cut == "output":
            self(*args, **(kwargs or {}))
        else:
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
        parts, stacks = self._parts, self._stacks
        if "" in parts:
            self._relay_steps(parts)
            with ExitStack() as scopes:
                enter_context(scopes, parts[""], self._contexts.info(calls_per_step=1))
                return parts[""](*args, **kwargs)
        if stacks is None or not stacks.are_of(self._original):
            return self._find(args, kwargs)
        try:
            return self._run(stacks, args, kwargs)
        except ChainBroken as broken:
            if self._make.ranks is not None:
                raise StateError(
                    f"{type(self._original).__name__} {broken}. Its stacks are not looked for again where there are other ranks, which may"
                    " have reused this step. Call cached.close() on all ranks, and begin a new generation."
                ) from None
            warn(
                f"{type(self._original).__name__} {broken}. Its stacks are looked for again: this step is computed, and the steps count"
                " from 0 unless cache_context(..., step_index=...) says which one it is."
            )
            self._heard.events = []
            return self._find(args, kwargs)

    def _run(self, stacks: Stacks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model's Python over cached stacks."""
        self._relay_steps(stacks.parts)
        return stacks.run(self._original, self._contexts.info(calls_per_step=1), args, kwargs)

    def _find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Find the stacks on a run of the model, and run it once over them."""
        with self._finding:
            self._drop()
            run = functools.partial(self._run, args=args, kwargs=kwargs)
            with Agreement(type(self._original).__name__, self._make.ranks).to_the_end() as agreement:
                stacks, returned = found_stacks(self._original, self._made, run, self._verify, agreement, args, kwargs)
            self._stacks, self._parts = stacks, stacks.parts
        return returned

    def _made(self, stack: nn.Module) -> CachedModel:
        """Make the cached model of a stack."""
        return self._ready(self._make.stack(stack, self.cache_config))

    def _drop(self) -> None:
        for cached in self._parts.values():
            cached.close()
        self._stacks, self._parts, self._relays = None, {}, []

    # -- life ----------------------------------------------------------------------------------------------------

    def configure(self, config: CacheConfig | Mapping[str, Any] | None = None, /, **changes: Any) -> None:
        """Change settings, or replace them all; see `CachedModel.configure`.

        Another `cut` drops the stacks, or looks for them at the next call.
        """
        new = self.cache_config.updated(config, changes)
        _check(self._original, new)
        if new.cut != self.cache_config.cut:
            parts = self._first_parts(new)
            self._drop()
            self._parts = parts
        else:
            for cached in self._parts.values():
                cached.configure(new)
        self.cache_config = new

    def reset(self, num_steps: int | None = None) -> None:
        """Begin a new generation in every context; see `CachedModel.reset`."""
        super().reset(num_steps)
        for cached in self._parts.values():
            cached.reset()

    def drop_context(self, name: str, *, group: str = "") -> None:
        """Free the cache of one context; see `CachedModel.drop_context`."""
        self._found()
        for cached in self._parts.values():
            cached.drop_context(name, group=group)

    def follow(self, source: Callable[[], RunStep | None] | None) -> None:
        """Take the run and the step of each call from the loop that makes the calls; see `CachedModel.follow`."""
        self._source = source
        for cached in self._parts.values():
            cached.follow(source)

    def on_step(self, callback: Callable[[StepEvent], None]) -> Handle:
        """Call a function after each step of each context; with several stacks, of each stack: `cond (blocks.0)`.

        See `CachedModel.on_step`.
        """
        return self._contexts.listeners.add(callback)

    def _relay_steps(self, parts: Mapping[str, CachedModel | UncapturedModel]) -> None:
        """Hear of the parts' steps while a callback is registered."""
        if bool(self._relays) == bool(self._contexts.listeners):
            return
        for handle in self._relays:
            handle.remove()
        wanted = parts.items() if self._contexts.listeners else ()
        self._relays = [cached.on_step(functools.partial(self._hear, suffix(parts, name))) for name, cached in wanted]

    def _hear(self, suffix: str, event: StepEvent) -> None:
        """Take a step of a stack."""
        self._heard.events.append(dataclasses.replace(event, context=event.context + suffix))

    def invalidate(self) -> None:
        """Take the weights for changed; see `CachedModel.invalidate`."""
        for cached in self._parts.values():
            cached.invalidate()

    def close(self) -> None:
        """Free every program and state. The original model is as it was."""
        self._drop()
        self._parts = self._first_parts(self.cache_config)

    def compile(self, **options: Any) -> None:
        """Compile each stack's graphs, or with `cut="output"` each block, with `torch.compile(**options)`.

        The model's own Python stays as it is.
        """
        self._compile_parts(operator.methodcaller("compile", **options))

    def compile_repeated_blocks(self, **options: Any) -> None:
        """Compile the blocks of each stack alone; see `CachedModel.compile_repeated_blocks`."""
        self._compile_parts(operator.methodcaller("compile_repeated_blocks", **options))

    def _compile_parts(self, compiles: Callable[[CachedModel | UncapturedModel], None]) -> None:
        """Compile the parts, those that are found later too."""
        self._compiles = compiles
        for cached in self._parts.values():
            compiles(cached)

    def report(self) -> Report:
        """Return what each context did in its current generation; with several stacks, what each of them did: `cond (blocks.0)`."""
        return parts_report(self._parts)


def _check(model: nn.Module, config: CacheConfig) -> None:
    check_calibration(model, config, "captured by region")
    if config.batch_reduce == "per_sample":
        raise ConfigError(
            "a model that is captured by region calls its stacks with whole batches, got batch_reduce='per_sample'. Use"
            " batch_reduce='max' or 'joint'."
        )
