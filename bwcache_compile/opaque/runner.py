"""Run a model's own Python: as it is, or with guards in the places of its blocks."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import nn

from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import CaptureError, warn
from bwcache_compile.ir.work_share import WARN_ABOVE
from bwcache_compile.opaque.blocks import FoundBlocks, find_blocks
from bwcache_compile.opaque.guards import Guard, StepCalls, compiled_block
from bwcache_compile.policies import POLICIES
from bwcache_compile.region.calls import record
from bwcache_compile.region.copies import with_modules, write_back
from bwcache_compile.runtime.watch import ModelWatch


class ModelRunner:
    """Runs a model and knows its blocks. Threads may run it side by side.

    Attributes:
        found: The blocks, where they were looked for.
    """

    def __init__(self, model: nn.Module) -> None:
        """Look for nothing yet."""
        self._model = model
        self._watch, self._lock = ModelWatch(model), threading.RLock()
        self.found: FoundBlocks | None = None
        self._found_in = -1
        self._compiled: dict[str, tuple[nn.Module, Callable[..., Any]]] = {}
        self._compile_options: dict[str, Any] | None = None

    @property
    def changed(self) -> str:
        """What moved the model's structure last."""
        return self._watch.changed

    def needs_blocks(self, config: CacheConfig) -> bool:
        """Whether the blocks must be known: they are cached, measured or compiled."""
        return config.cut == "blocks" or POLICIES[config.policy].measures or self._compile_options is not None

    def look(self, reuses: bool) -> tuple[int, int]:
        """Compare the model with what it was, and return its structure and weights.

        Args:
            reuses: Whether the step reuses, so that comparing all of the model would cost more than the step.
        """
        with self._lock:
            self._watch.glance() if reuses else self._watch.poll()
            return self._watch.structure, self._watch.weights

    def find(self, config: CacheConfig, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
        """Look for the blocks on a run of the model, where they are needed and not known.

        Returns:
            The leaves of what the model returned; None where it was not run.

        Raises:
            CaptureError: It has no blocks.
        """
        with self._lock:
            if not self.needs_blocks(config) or (self.found is not None and self._found_in == self._watch.structure):
                return None
            return self._find(config, args, kwargs)

    def _find(self, config: CacheConfig, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        name = type(self._model).__name__
        recording = record(self._model, args, kwargs)
        found = find_blocks(recording)
        if not found.paths:
            raise CaptureError(
                f"{name} has no blocks: at no call of it are several modules of one torch.nn.ModuleList, ModuleDict or Sequential called"
                ' that multiply matrices. Hold the blocks in a torch.nn.ModuleList. With cut="output" and a policy that measures nothing,'
                " such as that of a calibrated plan, no blocks are needed."
            )
        if config.cut == "blocks" and 1 - found.share > WARN_ABOVE:
            left_out = "".join(f"\n  {reason}" for reason in found.left_out)
            warn(f"a reused step of {name} still runs {1 - found.share:.0%} of the work outside its cached blocks.{left_out}")
        self._watch.accept_changes()
        self.found, self._found_in = found, self._watch.structure
        self._compiled.clear()
        return recording.outputs

    def guarded(self, calls: StepCalls, /, *args: Any, **kwargs: Any) -> Any:
        """Run the model with guards in the places of its blocks."""
        assert self.found is not None
        numbers: Counter[str] = Counter()
        guards = {}
        for path in self.found.paths:
            block = self._model.get_submodule(path)
            guards[path] = Guard(block, path, self._runnable(path, block), calls, numbers)
        copies = with_modules(self._model, guards)
        returned = copies[""](*args, **kwargs)
        write_back(self._model, copies)
        with self._lock:
            self._watch.accept_changes()
        return returned

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model as it is."""
        returned = self._model(*args, **kwargs)
        with self._lock:
            self._watch.accept_changes()
        return returned

    def _runnable(self, path: str, block: nn.Module) -> Callable[..., Any]:
        """Return what runs a block."""
        if self._compile_options is None:
            return block
        held = self._compiled.get(path)
        if held is None or held[0] is not block:
            held = self._compiled[path] = block, compiled_block(block, self._compile_options)
        return held[1]

    def compile(self, options: dict[str, Any]) -> None:
        """Compile each block with these options of `torch.compile` from here on."""
        self._compile_options = options
        self._compiled.clear()

    def touch(self) -> None:
        """Take the weights for changed."""
        with self._lock:
            self._watch.weights += 1
            self._watch.suspect()

    def suspect(self) -> None:
        """Compare all of the model at the next call."""
        self._watch.suspect()

    def forget(self) -> None:
        """Drop what was found and compiled."""
        self.found = None
        self._compiled.clear()
