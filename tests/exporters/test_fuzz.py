"""500 drawn bundles that were tampered with: whatever is wrong is said in our own words, and nothing outside changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bwcache_compile.bundle.manifest_text import write_text
from tests.exporters.tampering import FIXED, alter_bytes, alter_tree, put, untouched_around, use


@pytest.fixture
def bundle(deployed: Any) -> Path:
    return deployed.folder


@pytest.fixture
def untouched(bundle: Path) -> Iterator[Path]:
    with untouched_around(bundle) as folder:
        yield folder


@settings(FIXED, max_examples=300)
@given(data=st.data(), guarded=st.booleans())
def test_manifests(bundle: Path, untouched: Path, data: st.DataObject, guarded: bool) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    alter_tree(data, manifest)
    (untouched / "manifest.json").write_text(write_text(manifest))
    use(untouched, guarded=guarded)


@settings(FIXED, max_examples=200)
@given(data=st.data(), guarded=st.booleans(), vouched=st.booleans())
def test_files(bundle: Path, untouched: Path, data: st.DataObject, guarded: bool, vouched: bool) -> None:
    name = data.draw(st.sampled_from(("manifest.json", "compute.onnx", "reuse.onnx", "guarded.onnx", "weights.bin")))
    content = alter_bytes(data, (bundle / name).read_bytes())
    put(untouched, name, content, vouched and name != "manifest.json")
    use(untouched, guarded=guarded)
    for path in bundle.iterdir():
        shutil.copy(path, untouched)
