"""500 drawn bundles that were tampered with: whatever is wrong is said in our own words, and nothing outside changes."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bwcache_compile as bw
from bwcache_compile.exporters.bundle import file_hash
from tests.models import OneStream

FIXED = settings(deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
OURS = (bw.BundleError, bw.ConfigError, bw.StateError)
TEXTS = (
    "",
    ".",
    "..",
    "../outside",
    "/etc/hostname",
    "compute.onnx",
    "weights.bin",
    "x",
    "s13",
    "9**9**9",
    "1//0",
    "nan",
    "inf",
    "int64",
    "\0",
)
NUMBERS = (-1, 0, 1, 2, 7, 10**12, 10**30, 0.5, -0.5, 1e300)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(TEXTS) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TEXTS) | st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@pytest.fixture
def bundle(deployed: Any) -> Path:
    return deployed.folder


@pytest.fixture
def untouched(bundle: Path) -> Iterator[Path]:
    """Give a copy of the bundle, and see that nothing around it has changed in the end."""
    around = bundle.parent

    def listed() -> dict[str, str]:
        return {str(path): file_hash(path) for path in around.rglob("*") if path.is_file() and path.parent.name != "copy"}

    before = listed()
    yield Path(shutil.copytree(bundle, around / "copy"))
    assert {path.name for path in (around / "copy").iterdir()} == {path.name for path in bundle.iterdir()}
    shutil.rmtree(around / "copy")
    assert listed() == before


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a JSON tree."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


def use(folder: Path, guarded: bool) -> None:
    """Open a bundle and run two steps: it works, or one of our errors says why not."""
    try:
        session = bw.load(folder, guarded=guarded)
        for _ in range(2):
            session(*(value.numpy() for value in OneStream().example(batch=2)))
        str(session.report())
    except OURS as error:
        said = str(error)
        if not said:
            raise


@settings(FIXED, max_examples=300)
@given(data=st.data(), guarded=st.booleans())
def test_manifests(bundle: Path, untouched: Path, data: st.DataObject, guarded: bool) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        *outer, last = data.draw(st.sampled_from(list(places(manifest))))
        holder = manifest
        for key in outer:
            holder = holder[key]
        match data.draw(st.sampled_from(("replace", "remove", "double"))):
            case "replace":
                holder[last] = data.draw(VALUES)
            case "remove":
                del holder[last]
            case "double" if isinstance(holder, list):
                holder.append(copy.deepcopy(holder[last]))
            case _:
                holder[f"{last}."] = holder[last]
    (untouched / "manifest.json").write_text(json.dumps(manifest))
    use(untouched, guarded)


@settings(FIXED, max_examples=200)
@given(data=st.data(), guarded=st.booleans(), vouched=st.booleans())
def test_files(bundle: Path, untouched: Path, data: st.DataObject, guarded: bool, vouched: bool) -> None:
    """With `vouched` the manifest has the altered file's hash, as whoever alters a bundle on purpose would see to."""
    name = data.draw(st.sampled_from(("manifest.json", "compute.onnx", "reuse.onnx", "guarded.onnx", "weights.bin")))
    content = bytearray((bundle / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, max(len(content) - 1, 0)))
        match data.draw(st.sampled_from(("cut", "overwrite", "insert", "swallow"))):
            case "cut":
                del content[start:]
            case "overwrite":
                content[start : start + 4] = data.draw(st.binary(min_size=1, max_size=4))
            case "insert":
                content[start:start] = data.draw(st.binary(min_size=1, max_size=16))
            case "swallow":
                del content[start : start + data.draw(st.integers(1, 64))]
    manifest = json.loads((bundle / "manifest.json").read_text())
    (untouched / name).write_bytes(content)
    if vouched and name != "manifest.json":
        manifest["files"][name] = {"bytes": len(content), "sha256": file_hash(untouched / name)}
        (untouched / "manifest.json").write_text(json.dumps(manifest))
    use(untouched, guarded)
    for path in bundle.iterdir():
        shutil.copy(path, untouched)
