"""What the tests of bundles share: altering one, and reading the refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bwcache_compile as bw
from bwcache_compile.exporters.bundle import file_hash

Edit = Callable[[dict[str, Any]], None]


def refusal(folder: Path, **arguments: Any) -> str:
    """Return why a bundle is refused."""
    with pytest.raises(bw.BundleError) as error:
        bw.load(folder, **arguments)
    return str(error.value).replace(str(folder.parent), "...")


def edit(folder: Path, change: Edit, *rehash: str) -> None:
    """Change the manifest, and let it vouch for files that were changed too."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in rehash:
        manifest["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": file_hash(folder / name)}
    change(manifest)
    path.write_text(json.dumps(manifest))
