"""The named errors and warnings. Each says what failed, the evidence, and what to do."""

from __future__ import annotations

import sys
import warnings


class ConfigError(ValueError):
    """A setting is out of range, or does not fit the model or the call."""


class CaptureError(RuntimeError):
    """The model could not be captured as a graph, or its capture computes something else than the model."""


class NoBlocksFoundError(RuntimeError):
    """The captured graph holds no stack of repeated blocks that could be cached."""


class UnsupportedGraphError(RuntimeError):
    """The graph does something that a cached step could not reproduce."""


class StateError(RuntimeError):
    """The cache state does not fit the call: a wrong shape, a context in use, a closed or already cached model."""


class InvariantError(AssertionError):
    """A pass broke one of this package's own rules: a bug of ours, never the user's."""


class CacheWarning(UserWarning):
    """The run is correct, but the cache did not do what it is there for."""


class ExportError(RuntimeError):
    """A cached program could not be written for another runtime, or what was written computes something else."""


class BundleError(RuntimeError):
    """An exported bundle is damaged, altered, incomplete, of a version that this one does not read, or was offered other weights."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its kind if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def warn(text: str) -> None:
    """Issue a `CacheWarning` at the innermost line outside this package and torch."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("bwcache_compile", "torch"):
        frame = frame.f_back
    known = frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(text, CacheWarning, frame.f_code.co_filename, frame.f_lineno, frame.f_globals.get("__name__"), known)
