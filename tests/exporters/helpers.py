"""What the tests of bundles share: one to test with, altering one, and reading the refusal."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bwcache_compile as bw
from bwcache_compile.bundle.files import file_hash
from bwcache_compile.bundle.manifest import Manifest, OutputsEntry
from bwcache_compile.bundle.manifest_text import write_text
from bwcache_compile.bundle.session import Session
from tests.models import OneStream, noise

CONFIG = bw.CacheConfig(num_steps=8, threshold=math.inf, reuse_interval=2)
Edit = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class Exported:
    """A cached model and the bundle that it was exported to."""

    cached: bw.CachedModel
    folder: Path
    manifest: Manifest


def plain_manifest() -> Manifest:
    """Return a manifest of nothing at all."""
    names = ("arguments", "inputs", "constants", "values", "symbols", "conditions", "slots", "blocks", "measured", "notes")
    empty: dict[str, Any] = dict.fromkeys(names, ())
    empty |= {"graphs": {}, "self_check": {}, "files": {}, "outputs": OutputsEntry(form={"value": None}, items=())}
    return Manifest(model="Nothing", graph_format="onnx", opset=20, torch="2.0", config=CONFIG, **empty)


def export_one_stream(folder: Path, **options: Any) -> Exported:
    """Export a model wide enough that its weights leave the graphs, every size open."""
    args = (noise("x", 0, 2, 6, 4), torch.ones(2))
    cached = bw.transform(OneStream(width=32).eval(), CONFIG, example_args=args, dynamic_shapes="auto")
    return Exported(cached, folder, bw.export(cached, folder, **options))


def refusal(folder: Path, **arguments: Any) -> str:
    """Return why a bundle is refused."""
    with pytest.raises(bw.BundleError) as error:
        bw.load(folder, **arguments)
    return str(error.value).replace(str(folder.parent), "...")


def edit(folder: Path, change: Edit, *rehash: str) -> None:
    """Change the manifest, with a checksum that fits, and let it vouch for files that were changed too."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in rehash:
        manifest["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": file_hash(folder / name)}
    change(manifest)
    path.write_text(write_text(manifest))


def opened(folder: Path) -> Session:
    """Open a bundle of torch's own files."""
    return bw.load(folder, backend="torch", allow_code=True)


def check_beside_torch(cached: bw.CachedModel, session: Session, sizes: tuple[int, int], tolerance: float) -> None:
    """Two contexts in turn; a tolerance of 0 asks for the same bits."""
    batch, tokens = sizes
    cached.reset()
    session.reset()
    for step in range(8):
        for name in ("cond", "uncond"):
            x, t = noise(f"x{name}", step, batch, tokens, 4), torch.full((batch,), 1 - step / 8)
            with torch.no_grad(), cached.cache_context(name), session.cache_context(name):
                expected, actual = cached(x, t), session(x, t=t)
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert str(session.report()) == str(cached.report())
    assert session.report().contexts["cond"].state_bytes == cached.report().contexts["cond"].state_bytes
