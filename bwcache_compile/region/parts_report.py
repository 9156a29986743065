"""Put the reports of a model's parts together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from bwcache_compile.region.uncaptured import UncapturedModel
from bwcache_compile.report import ContextReport, Report
from bwcache_compile.runtime import CachedModel


def suffix(parts: Mapping[str, Any], name: str) -> str:
    """Return what tells the contexts of a part from those of the others."""
    return "" if len(parts) == 1 else f" ({name})"


def parts_report(parts: Mapping[str, CachedModel | UncapturedModel]) -> Report:
    """Return one report of all parts, whose contexts are named apart."""
    contexts: dict[str, ContextReport] = {}
    blocks: list[str] = []
    captures = 0
    for name, cached in parts.items():
        report = cached.report()
        blocks += report.blocks
        captures += report.captures
        for context, done in report.contexts.items():
            shown = context + suffix(parts, name)
            contexts[shown] = dataclasses.replace(done, name=shown)
    return Report(contexts, tuple(blocks), captures)
