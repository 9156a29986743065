"""What users call about the contexts of a cached model or a session. Needs no torch."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from typing import Any

from bwcache_compile.context_scope import row_group
from bwcache_compile.contexts import ContextTable
from bwcache_compile.errors import ConfigError
from bwcache_compile.step_events import Handle, StepEvent
from bwcache_compile.stepping import RunStep, StepInfo


def _row_names(rows: Sequence[str]) -> list[str]:
    """Return the names of the samples of a batch.

    Raises:
        ConfigError: They are no different strings.
    """
    names = [rows] if isinstance(rows, str) else list(rows)
    if isinstance(rows, str) or not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f'rows must be a list of names, one for each sample of the batch, such as ["a", "b"], got {rows!r}.')
    if len(set(names)) < len(names):
        raise ConfigError(f"rows must be different names, got {names}.")
    return names


def whole_number(what: str, value: Any) -> int | None:
    """Return a number that a caller says about a step; None where it says none. Tensors and numpy's whole numbers are numbers, too.

    Raises:
        ConfigError: It is no single whole number.
    """
    if value is None or type(value) is int:
        return value
    try:
        return operator.index(value)
    except (TypeError, ValueError):  # of a tensor with several values
        rows = ", and rows does not name the samples of a batch" if isinstance(value, Sequence) and not isinstance(value, str) else ""
        raise ConfigError(f"{what} must be a single whole number, got {value!r}{rows}.") from None


def _for_each(what: str, value: Any, count: int) -> list[int | None]:
    """Return a number for each sample of a batch.

    Raises:
        ConfigError: Another number of numbers is given, or one is no whole number.
    """
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [whole_number(what, value)] * count
    if len(value) != count:
        raise ConfigError(f"{what} has {len(value)} entries, but rows names {count} samples.")
    return [whole_number(what, each) for each in value]


class ContextMethods:
    """The methods about contexts that a cached model and a session share; each keeps its own `_contexts` and defines `configure`."""

    _contexts: ContextTable[Any]

    def cache_context(
        self,
        name: str,
        *,
        step_index: int | Sequence[int] | None = None,
        num_inference_steps: int | Sequence[int] | None = None,
        group: str = "",
        rows: Sequence[str] | None = None,
        **details: Any,
    ) -> contextlib.AbstractContextManager[None]:
        """Name the stream of calls that the block belongs to, and the step where the caller knows it.

        Args:
            name: Contexts of different names share nothing, and neither do those of different groups.
            step_index: Index of the denoising step; one that goes back begins a new generation. With `rows`, one for all or one for each.
            num_inference_steps: Steps of this generation, if the settings do not say. With `rows`, one for all or one for each.
            group: One for each video that is made at the same time. With `CacheConfig(decide="joint")` the contexts of a
                group decide together. Reports list a context of a group as `group/name`.
            rows: With `CacheConfig(batch_reduce="per_sample")`: a name for each sample of the batch, in order. A sample keeps its cache
                under its name, wherever it stands in later batches. Reports list it as `row/name`.
            **details: What else a pipeline knows (sigma, timestep); not needed.

        Raises:
            ConfigError: A number is no whole number, there are several without `rows`, or `rows` are no different names.
        """
        if rows is None:
            step, count = whole_number("step_index", step_index), whole_number("num_inference_steps", num_inference_steps)
            return self._contexts.scope(StepInfo(name, step, count, group=group), self._unused)
        names = _row_names(rows)
        steps, counts = _for_each("step_index", step_index, len(names)), _for_each("num_inference_steps", num_inference_steps, len(names))
        infos = tuple(
            StepInfo(name, step, count, group=row_group(row, group)) for row, step, count in zip(names, steps, counts, strict=True)
        )
        return self._contexts.scope(StepInfo(name, group=group), self._unused, infos)

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
