"""Add the weights to a bundle that was exported without them."""

from __future__ import annotations

from pathlib import Path

import bwcache_compile as bw
from bwcache_compile.cli.screen import Screen
from bwcache_compile.printing import bytes_text


def complete_bundle(screen: Screen, bundle: Path, source: Path) -> None:
    """Complete a bundle and show what it has now.

    Raises:
        BundleError: See `add_weights`.
    """
    with screen.progress("writing the weights"):
        manifest = bw.add_weights(bundle, source)
    sources = manifest.weight_sources
    assert sources is not None
    entry = manifest.files[sources.file]
    document = {"bundle": str(bundle), "source": str(source), "file": sources.file, **entry.to_json(), "tensors": len(sources.tensors)}
    screen.show(document, f"{bundle}: {sources.file} is there as it was exported, {bytes_text(entry.bytes)}, SHA-256 {entry.sha256}")
