"""Write a model as a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import bwcache_compile as bw
from bwcache_compile.cli.bundles import summary
from bwcache_compile.cli.models import head, loaded, transformed
from bwcache_compile.cli.named import Named
from bwcache_compile.cli.screen import Screen, table
from bwcache_compile.ir.compare import Verify
from bwcache_compile.printing import bytes_text


def export_model(
    screen: Screen,
    named: Named,
    out: Path,
    config: bw.CacheConfig | None,
    blocks: Sequence[str] | None,
    verify: Verify,
    graph_format: str,
    guarded: bool,
    blocks_once: bool,
    opset: int,
    dynamic: bool,
    include_weights: bool,
) -> None:
    """Export a model and show what was written. A failure leaves what was there.

    Raises:
        ExportError: See `export`.
    """
    source = loaded(screen, named)
    cached = transformed(screen, source, config, blocks, verify=verify, dynamic_shapes="auto" if dynamic else None)
    with screen.progress("exporting and checking"):
        manifest = bw.export(
            cached, out, graph_format, guarded=guarded, blocks_once=blocks_once, opset=opset, include_weights=include_weights
        )
    left_out = None if manifest.weight_sources is None else manifest.weight_sources.file
    sizes = {name: entry.bytes for name, entry in manifest.files.items()}
    document = {**head(source), "bundle": str(out), **summary(manifest), "files": sizes, "left_out": left_out}
    rows = [(name, bytes_text(size) + " left out" * (name == left_out)) for name, size in sizes.items()]
    check = manifest.self_check
    screen.show(
        document,
        f"{out}: {manifest.model}, {manifest.graph_format}, {len(manifest.blocks)} blocks cached",
        table(("file", "bytes"), rows, ("bytes",)),
        f"checked beside torch: steps {check.get('steps')}, largest error {check.get('largest_error', 0):.2g}"
        f" (tolerance {check.get('tolerance', 0):g})",
    )
