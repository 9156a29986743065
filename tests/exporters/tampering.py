"""Drawn damage to bundles, and the ways to see that it does no harm."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import bwcache_compile as bw
from bwcache_compile.bundle.files import file_hash
from bwcache_compile.bundle.manifest_text import write_text
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
    "compute.pt2",
    "weights.bin",
    "x",
    "s13",
    "9**9**9",
    "1//0",
    "nan",
    "inf",
    "int64",
    "cuda",
    "meta",
    "\0",
)
NUMBERS = (-1, 0, 1, 2, 7, 10**12, 10**30, 0.5, -0.5, 1e300)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(TEXTS) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TEXTS) | st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@contextlib.contextmanager
def untouched_around(bundle: Path) -> Iterator[Path]:
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


def alter_tree(data: st.DataObject, tree: Any) -> None:
    """Replace, remove or double one or two values of a JSON tree."""
    for _ in range(data.draw(st.integers(1, 2))):
        found = list(places(tree))
        if not found:
            break
        *outer, last = data.draw(st.sampled_from(found))
        holder = tree
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


def alter_bytes(data: st.DataObject, content: bytes) -> bytes:
    """Cut, overwrite, insert or swallow bytes at one to three places."""
    altered = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, max(len(altered) - 1, 0)))
        match data.draw(st.sampled_from(("cut", "overwrite", "insert", "swallow"))):
            case "cut":
                del altered[start:]
            case "overwrite":
                altered[start : start + 4] = data.draw(st.binary(min_size=1, max_size=4))
            case "insert":
                altered[start:start] = data.draw(st.binary(min_size=1, max_size=16))
            case "swallow":
                del altered[start : start + data.draw(st.integers(1, 64))]
    return bytes(altered)


def put(folder: Path, name: str, content: bytes, vouched: bool) -> None:
    """Write a file of a bundle; `vouched` says that the manifest gets its hash, as whoever alters a bundle on purpose would see to."""
    (folder / name).write_bytes(content)
    if vouched:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][name] = {"bytes": len(content), "sha256": file_hash(folder / name)}
        (folder / "manifest.json").write_text(write_text(manifest))


def use(folder: Path, **arguments: Any) -> None:
    """Open a bundle and run two steps: it works, or one of our errors says why not."""
    try:
        session = bw.load(folder, **arguments)
        for _ in range(2):
            session(*(value.numpy() for value in OneStream().example(batch=2)))
        str(session.report())
    except OURS as error:
        if not str(error):
            raise
