"""Show what the passes change in the graph of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

import bwcache_compile as bw
from bwcache_compile.cli.models import head, loaded, transformed
from bwcache_compile.cli.named import Named
from bwcache_compile.cli.outcome import UsageError
from bwcache_compile.cli.screen import Screen, table
from bwcache_compile.ir.compare import Verify


def diff_model(
    screen: Screen,
    named: Named,
    config: bw.CacheConfig | None,
    blocks: Sequence[str] | None,
    verify: Verify,
    passes: Sequence[str],
    guard: Any,
) -> None:
    """Show what passes changed; without names, the table of all passes and what all did together."""
    source = loaded(screen, named)
    cached = transformed(screen, source, config, blocks, verify=verify, guard=guard)
    with screen.progress("running the passes"):
        diffs = cached.graph_diff()
    unknown = [name for name in passes if name not in (*diffs, "all")]
    if unknown:
        raise UsageError(f"there is no pass {unknown[0]!r}; choose from {', '.join(diffs)}, or all")
    chosen = list(diffs) if "all" in passes else list(passes or ["whole"])
    document = {**head(source), "passes": list(diffs), "diffs": {name: vars(diffs[name]) for name in chosen}}
    rows = [
        (name, sum(diff.added.values()), sum(diff.removed.values()), diff.shared_parameters, diff.blocks_guarded or "")
        for name, diff in diffs.items()
    ]
    overview = table(("pass", "added", "removed", "parameters", "blocks"), rows, ("added", "removed", "parameters", "blocks"))
    texts = "\n\n".join(str(diffs[name]) if diffs[name].text else f"@@ {name}\nno operator changed" for name in chosen)
    parts: list[str | Table] = [] if passes else [overview, ""]
    screen.show(document, *parts, texts)
