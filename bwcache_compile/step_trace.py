"""Write the steps of a run as a trace that Perfetto and Chrome open. Needs no torch."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bwcache_compile.atomic_write import write_atomically
from bwcache_compile.context_methods import ContextMethods
from bwcache_compile.errors import ConfigError
from bwcache_compile.step_events import StepEvent

_MICROSECONDS = 1e6


@contextlib.contextmanager
def trace_steps(path: str | Path, *models: Any) -> Iterator[None]:
    """Record each step of cached models or sessions while the block runs, and write them when it ends, also when it fails.

    The file is a JSON trace in Chrome's event format: open it at https://ui.perfetto.dev or in chrome://tracing. Each model is a
    process and each context a thread of it; a step is a slice named `compute` or `reuse` with its index, the reason and the indicator,
    and the indicator is a counter besides. Times are the host's: a device may still be computing when a call has returned. For the
    kernels of a device use `torch.profiler`.

    Args:
        path: The file; one that is there is replaced.
        models: What `transform` or `load` returned, compiled or not. Two experts of one pipeline are two models.

    Raises:
        ConfigError: There is no model, or one is something else.
        OSError: The file could not be written.
    """
    followed = [getattr(model, "_orig_mod", model) for model in models]  # what torch.compile returned of it
    if not followed or not all(isinstance(model, ContextMethods) for model in followed):
        given = ", ".join(type(model).__name__ for model in models) or "nothing"
        raise ConfigError(f"trace_steps expects results of transform or load, got {given}.")
    recorded: list[list[StepEvent]] = [[] for _ in followed]
    handles = [model.on_step(events.append) for model, events in zip(followed, recorded, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        names = [_name(model) for model in followed]
        write_atomically(path, json.dumps({"traceEvents": _trace(names, recorded), "displayTimeUnit": "ms"}) + "\n")


def _name(model: Any) -> str:
    """Name a model as its users know it."""
    return str(model.manifest.model) if hasattr(model, "manifest") else type(model.original).__name__


def _trace(names: list[str], recorded: list[list[StepEvent]]) -> list[dict[str, Any]]:
    """Return the events of all models, in Chrome's format; times begin with the first step."""
    start = min((event.entered for events in recorded for event in events), default=0.0)
    made: list[dict[str, Any]] = []
    for process, (name, events) in enumerate(zip(names, recorded, strict=True), start=1):
        made.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}})
        threads = {context: number for number, context in enumerate(dict.fromkeys(event.context for event in events), start=1)}
        for context, thread in threads.items():
            made.append({"ph": "M", "name": "thread_name", "pid": process, "tid": thread, "args": {"name": context}})
        for event in events:
            begin = (event.entered - start) * _MICROSECONDS
            place = {"cat": "bwcache", "pid": process, "tid": threads[event.context], "ts": begin}
            measured = event.indicator is not None and math.isfinite(event.indicator)
            shown: dict[str, Any] = {"step": event.step, "num_steps": event.num_steps, "reason": event.reason}
            shown["indicator"] = event.indicator if measured or event.indicator is None else str(event.indicator)
            name = "compute" if event.computed else "reuse"
            made.append({"ph": "X", "name": name, **place, "dur": event.seconds * _MICROSECONDS, "args": shown})
            if measured:
                made.append({"ph": "C", "name": f"indicator of {event.context}", **place, "args": {"indicator": event.indicator}})
    return made
