"""Trace one graph at a time: torch's tracers patch every module of the process, and restore what they found."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

_LOCK = threading.RLock()
"""Two tracers at once restore one another's patches, and each finds the other's modules in its own graph."""

_LOGGERS = (
    "torch.fx.experimental.symbolic_shapes",
    "torch._subclasses.fake_tensor",
    "torch.export",
    "torch._export",
    "torch._dynamo",
    "torch._functorch",
)


class _WithoutOwnThread(io.TextIOBase):
    """A stream that drops what the thread that made it writes, until it is released; it passes on what other threads write."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._thread = stream, threading.get_ident()

    def release(self) -> None:
        self._thread = 0

    def write(self, text: str, /) -> int:
        if threading.get_ident() == self._thread or self._stream is None:
            return len(text)
        return int(self._stream.write(text))

    def flush(self) -> None:
        if self._stream is not None:
            self._stream.flush()

    def fileno(self) -> int:
        return int(self._stream.fileno())

    def isatty(self) -> bool:
        return bool(self._stream.isatty())

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return str(self._stream.encoding)


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    stream = sys.stderr
    silent = _WithoutOwnThread(stream)
    sys.stderr = silent
    try:
        yield
    finally:
        silent.release()
        if sys.stderr is silent:  # another thread may have put a stream of its own there
            sys.stderr = stream


@contextlib.contextmanager
def _without_logs(names: tuple[str, ...]) -> Iterator[None]:
    """Silence loggers, except those whose level the user has lowered."""
    loggers = [logger for logger in map(logging.getLogger, names) if logger.getEffectiveLevel() >= logging.WARNING]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def tracing(*loggers: str) -> Iterator[None]:
    """Hold the process-wide tracing lock, and keep torch from printing, warning and logging while active.

    Where a front end fails, torch prints the graph so far, thousands of lines of it, also if the next one succeeds.

    Args:
        *loggers: More loggers to silence.
    """
    with _LOCK, _without_stderr(), _without_logs((*_LOGGERS, *loggers)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
