"""Drawn bundles of exported programs that were tampered with: also where code is allowed, what is wrong is said in our own words."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from bwcache_compile.bundle.manifest_text import write_text
from tests.exporters.helpers import export_one_stream
from tests.exporters.tampering import FIXED, alter_bytes, alter_tree, put, untouched_around, use

TORCH: dict[str, Any] = {"backend": "torch", "allow_code": True}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_one_stream(tmp_path_factory.mktemp("exported") / "bundle", format="pt2").folder


@pytest.fixture
def untouched(bundle: Path) -> Iterator[Path]:
    with untouched_around(bundle) as folder:
        yield folder


def altered_program(data: st.DataObject, content: bytes) -> bytes:
    """Alter one file of an archive: values of the program, or bytes."""
    altered = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(altered, "w") as new:
        names = [entry.filename for entry in old.infolist()]
        graphs = [name for name in names if name.endswith("models/model.json")]
        chosen = data.draw(st.sampled_from(names) | st.sampled_from(graphs))
        for entry in old.infolist():
            inside = old.read(entry)
            if entry.filename == chosen and chosen.endswith(".json"):
                tree = json.loads(inside)
                alter_tree(data, tree)
                inside = json.dumps(tree).encode()
            elif entry.filename == chosen:
                inside = alter_bytes(data, inside)
            new.writestr(entry.filename, inside)
    return altered.getvalue()


def manifests(bundle: Path, untouched: Path, data: st.DataObject) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    alter_tree(data, manifest)
    (untouched / "manifest.json").write_text(write_text(manifest))
    use(untouched, **TORCH)


def files(bundle: Path, untouched: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(("compute.pt2", "reuse.pt2", "weights.bin")))
    alter = data.draw(st.sampled_from((alter_bytes, altered_program))) if name != "weights.bin" else alter_bytes
    put(untouched, name, alter(data, (bundle / name).read_bytes()), vouched=True)
    use(untouched, **TORCH)
    for path in bundle.iterdir():
        shutil.copy(path, untouched)


UNSHRUNK = settings(FIXED, phases=[Phase.generate])  # opening a program takes a fifth of a second

test_manifests = settings(UNSHRUNK, max_examples=15)(given(data=st.data())(manifests))
test_files = settings(UNSHRUNK, max_examples=10)(given(data=st.data())(files))
test_many_manifests = pytest.mark.slow(settings(UNSHRUNK, max_examples=150)(given(data=st.data())(manifests)))
test_many_files = pytest.mark.slow(settings(UNSHRUNK, max_examples=300)(given(data=st.data())(files)))
