"""What users call about the contexts of a cached model or a session. Needs no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from bwcache_compile.contexts import ContextTable
from bwcache_compile.step_events import Handle, StepEvent
from bwcache_compile.stepping import RunStep, StepInfo


class ContextMethods:
    """The methods about contexts that a cached model and a session share; each keeps its own `_contexts` and defines `configure`."""

    _contexts: ContextTable[Any]

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
        return self._contexts.scope(StepInfo(name, step_index, num_inference_steps, group=group), self._unused)

    def _unused(self, info: StepInfo) -> None:
        """Called at the end of such a block if no call came in it."""

    def reset(self, num_steps: int | None = None) -> None:
        """Begin a new generation in every context; `num_steps` replaces the configured number from here on.

        Raises:
            ConfigError: `num_steps` does not fit the settings.
        """
        if num_steps is not None:
            self.configure(num_steps=num_steps)
        self._contexts.clear()

    def follow(self, source: Callable[[], RunStep | None] | None) -> None:
        """Take the run and the step of each call from the loop that makes the calls, such as a pipeline's.

        A new run begins a new generation in every context. What `cache_context` says of the step comes before what the loop says.

        Args:
            source: Called at each call. It returns None where it knows nothing; None follows no loop any more.
        """
        self._contexts.follow = source

    def on_step(self, callback: Callable[[StepEvent], None]) -> Handle:
        """Call a function after each step of each context, with a `StepEvent`.

        The indicator of a computed step is read from the device only while a callback is registered. An error that a callback raises
        is the caller's of the model; the step itself has succeeded by then.

        Returns:
            A handle whose `remove()` ends it.
        """
        return self._contexts.listeners.add(callback)

    def configure(self, **changes: Any) -> None:
        """Change settings."""
        raise NotImplementedError

    def drop_context(self, name: str, *, group: str = "") -> None:
        """Free the cache of one context, such as that of a request that was broken off; its next call begins a new generation.

        Raises:
            StateError: There is no such context, or another thread is in it.
        """
        self._contexts.drop(StepInfo(name, group=group).key)
