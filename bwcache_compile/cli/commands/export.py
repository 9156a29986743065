"""Write a model as a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import bwcache_compile as bw
from bwcache_compile.bundle.manifest import Manifest
from bwcache_compile.cli.models import head, loaded, transformed
from bwcache_compile.cli.named import Named
from bwcache_compile.cli.screen import Screen, bytes_text, table


def export_model(
    screen: Screen,
    named: Named,
    out: Path,
    config: bw.CacheConfig | None,
    blocks: Sequence[str] | None,
    graph_format: str,
    guarded: bool,
    opset: int,
    dynamic: bool,
) -> None:
    """Export a model and show what was written. A failure leaves what was there.

    Raises:
        ExportError: See `export`.
    """
    source = loaded(screen, named)
    cached = transformed(screen, source, config, blocks, dynamic_shapes="auto" if dynamic else None)
    with screen.progress("exporting and checking"):
        manifest = bw.export(cached, out, graph_format, guarded=guarded, opset=opset)
    sizes = {name: entry.bytes for name, entry in manifest.files.items()}
    document = {**head(source), "bundle": str(out), **summary(manifest), "files": sizes}
    rows = [(name, bytes_text(size)) for name, size in sizes.items()]
    check = manifest.self_check
    screen.show(
        document,
        f"{out}: {manifest.model}, {manifest.graph_format}, {len(manifest.blocks)} blocks cached",
        table(("file", "bytes"), rows, ("bytes",)),
        f"checked beside torch: steps {check.get('steps')}, largest error {check.get('largest_error', 0):.2g}"
        f" (tolerance {check.get('tolerance', 0):g})",
    )


def summary(manifest: Manifest) -> dict[str, object]:
    """Return what people ask of a manifest first; the file has the rest."""
    return {
        "bundle_model": manifest.model,
        "format": manifest.graph_format,
        "opset": manifest.opset,
        "graphs": {kind: entry.file for kind, entry in manifest.graphs.items()},
        "blocks": [block.to_json() for block in manifest.blocks],
        "inputs": [{"name": e.name, "shape": list(e.shape), "dtype": e.dtype} for e in manifest.inputs],
        "slots": [{"name": e.name, "role": e.role, "shape": list(e.shape), "dtype": e.dtype} for e in manifest.slots],
        "policy": manifest.config.policy,
        "reuse": manifest.config.reuse,
        "self_check": dict(manifest.self_check),
    }
