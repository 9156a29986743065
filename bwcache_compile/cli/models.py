"""What the commands that take a model begin with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import bwcache_compile as bw
from bwcache_compile.cli.named import Named
from bwcache_compile.cli.screen import Screen
from bwcache_compile.cli.source import Source, load_source


def loaded(screen: Screen, named: Named) -> Source:
    """Load what the command line names, with progress."""
    with screen.progress("loading the model"):
        return load_source(named)


@contextlib.contextmanager
def _hint(verify: str) -> Iterator[None]:
    """Name the option for a graph that differs from its model by rounding."""
    try:
        yield
    except bw.CaptureError as error:
        if verify == "bitwise":
            error.add_note("With --verify close, a graph that differs from the model by rounding alone is taken.")
        raise


def transformed(
    screen: Screen, source: Source, config: bw.CacheConfig | None, blocks: Sequence[str] | None = None, **options: Any
) -> bw.CachedModel:
    """Capture the model for its example inputs and rewrite it, with progress."""
    with screen.progress(f"capturing {source.title}"), _hint(str(options.get("verify"))):
        return bw.transform(source.model, config, blocks=blocks or None, example_args=source.args, example_kwargs=source.kwargs, **options)


def head(source: Source) -> dict[str, Any]:
    """Return what every document about a model begins with."""
    return {"model": source.title, "source": source.named, "versions": {"bwcache_compile": bw.__version__, "torch": torch.__version__}}
