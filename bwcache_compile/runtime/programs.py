"""The programs of one model: made when a call needs one, kept while they fit, and dropped when the model changes."""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from torch import nn
from torch.fx import GraphModule

from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import CacheWarning, StateError
from bwcache_compile.graph_text import GraphDiff
from bwcache_compile.program import CachedProgram
from bwcache_compile.runtime.loaded import LoadedProgram
from bwcache_compile.runtime.signature import call_key
from bwcache_compile.runtime.watch import ModelWatch

MAX_PROGRAMS = 8
"""Signatures kept at a time; the least recently used goes first."""


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """How a model becomes a program; handed in, so that running needs no compiler.

    Attributes:
        capture: Model, positional and keyword arguments to a captured program.
        build: A captured program, which it consumes, and settings to a cached one.
        explain: The same to the diff of each pass.
    """

    capture: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], CachedProgram]
    build: Callable[[CachedProgram, CacheConfig], CachedProgram]
    explain: Callable[[CachedProgram, CacheConfig], dict[str, GraphDiff]]


@dataclasses.dataclass(frozen=True)
class Fit:
    """What a call is run with: a cache serves the next call only if that one's fit is the same.

    Attributes:
        loaded: The program.
        key: What the call looks like; another one means other inputs, so another generation.
        sizes: The values of the program's symbols at this call; empty where no size is open.
        version: The model's structure and weights; another one means that what is cached came from another model.
        changed: What changed in the model's structure last, for messages.
    """

    loaded: LoadedProgram
    key: Hashable
    sizes: Mapping[str, int]
    version: tuple[int, int]
    changed: str


def _is_flat(model: nn.Module) -> bool:
    """Whether a model is an exported graph: its mode is built in, and it has no `eval()`."""
    if not isinstance(model, GraphModule):
        return False
    return all(node.op != "call_module" or node.target == "_guards_fn" for node in model.graph.nodes)


class ProgramCache:
    """Chooses the program of a call, capturing the model where there is none. Threads take turns in here."""

    def __init__(self, model: nn.Module, toolchain: Toolchain) -> None:
        """Capture nothing yet."""
        self._model, self._toolchain = model, toolchain
        self.watch = ModelWatch(model)
        self._loaded: OrderedDict[Hashable, LoadedProgram] = OrderedDict()
        self._structure = self.watch.structure
        self._compile_options: dict[str, Any] | None = None
        self._lock = threading.RLock()
        self._idle = threading.Condition(self._lock)
        self._running = 0
        self.captured = 0

    def __len__(self) -> int:
        return len(self._loaded)

    def fit(self, args: tuple[Any, ...], kwargs: dict[str, Any], config: CacheConfig) -> Fit:
        """Return the program for a call, capturing the model if there is none yet.

        Raises:
            CaptureError, NoBlocksFoundError, UnsupportedGraphError: The model is captured for this call, and cannot be.
            ConfigError: The settings or an input do not fit, or the model has offload hooks.
            StateError: The model is in training mode, or an input requires gradients.
        """
        if self._model.training and not _is_flat(self._model):
            raise StateError(f"{type(self._model).__name__} is in training mode; call .eval() first: caching is for inference.")
        key = call_key(args, kwargs)
        with self._lock:
            self.watch.look()
            if self._structure != self.watch.structure:
                self._loaded.clear()
                self._structure = self.watch.structure
            if key not in self._loaded:
                # tracing puts hooks on every module of the process, and modules that run meanwhile would run into them
                self._idle.wait_for(lambda: self._running == 0)
            loaded = self._loaded.get(key) or self._capture(key, args, kwargs, config)
            self._loaded.move_to_end(key)
            while len(self._loaded) > MAX_PROGRAMS:
                self._loaded.popitem(last=False)
            return Fit(loaded, key, {}, (self.watch.structure, self.watch.weights), self.watch.changed)

    def _capture(self, key: Hashable, args: tuple[Any, ...], kwargs: dict[str, Any], config: CacheConfig) -> LoadedProgram:
        program = self._toolchain.capture(self._model, args, kwargs)
        loaded = LoadedProgram(self._toolchain.build(program, config))
        self.watch.absorb()
        if self._compile_options is not None:
            loaded.compile(self._compile_options)
        self._loaded[key] = loaded
        self.captured += 1
        if self.captured == 3 * MAX_PROGRAMS:
            changed = f" (last: {self.watch.changed})" if self.watch.changed else ""
            warnings.warn(
                f"{self.captured} programs of {type(self._model).__name__} were captured; something in its inputs changes from call"
                f" to call (a Python number that could be a tensor?), or in its modules{changed}, and each capture takes seconds.",
                CacheWarning,
                stacklevel=2,
            )
        return loaded

    @property
    def latest(self) -> LoadedProgram:
        """The program used last.

        Raises:
            StateError: There is none yet.
        """
        if not self._loaded:
            raise StateError("nothing is captured yet: call the model once, or pass example_args / example_kwargs to transform.")
        return next(reversed(self._loaded.values()))

    def explain(self, config: CacheConfig) -> dict[str, GraphDiff]:
        """Return what each pass changed in the program used last."""
        return self._toolchain.explain(self.latest.program.fresh(), config)

    def compile(self, options: dict[str, Any]) -> None:
        """Compile every program with these options of `torch.compile`, those captured later too."""
        self._compile_options = options
        for loaded in self._loaded.values():
            loaded.compile(options)

    def enter(self) -> None:
        """Keep captures out until `leave`: a program runs."""
        with self._lock:
            self._running += 1

    def leave(self) -> None:
        """Let captures in again once no program runs."""
        with self._lock:
            self._running -= 1
            self._idle.notify_all()

    def touch(self) -> None:
        """Take the weights for changed: something was called that may write to them where nothing counts it."""
        with self._lock:
            self.watch.weights += 1

    def clear(self) -> None:
        """Drop every program."""
        with self._lock:
            self._loaded.clear()
