"""Where bundles are written: nothing but a bundle is replaced, and whatever goes wrong, what was there is there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from expecttest import assert_expected_inline

import bwcache_compile as bw
from bwcache_compile.exporters.write import add_files, new_bundle, write_manifest
from tests.exporters.helpers import plain_manifest

Write = Callable[[Path], None]


def write(at: Path, text: str = "new") -> None:
    """Write what passes for a bundle here."""
    with new_bundle(at) as folder:
        (folder / "a").write_text(text)
        write_manifest(folder, plain_manifest(), {})


def add(at: Path) -> None:
    """Put one more file into what `write` wrote, and change another."""
    add_files(at, {"a": "changed", "b": "added"}, plain_manifest())


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(folder: Path, *places: Path) -> str:
    """Return why each place is refused; nothing may change."""
    before, messages = content(folder), []
    for place in places:
        with pytest.raises(bw.ExportError) as refusal:
            write(place)
        messages.append(str(refusal.value).replace(str(folder), "..."))
    assert content(folder) == before
    return "\n".join(messages)


def test_nothing_else_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("dear")
    for name, manifest in (("letters", None), ("app", '{"format": "of another kind", "files": ["letter"]}'), ("damaged", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "letter").write_text("dear")
        if manifest is not None:
            (tmp_path / name / "manifest.json").write_text(manifest)
    write(tmp_path / "mixed")
    (tmp_path / "mixed" / "letter").write_text("dear")
    places = [tmp_path / name for name in ("file", "file/bundle", "letters", "app", "damaged", "mixed")]
    assert_expected_inline(
        refused(tmp_path, *places),
        """\
.../file exists and is not a bundle; it is not overwritten. Choose another directory.
cannot write .../file/bundle: [Errno 17] File exists: '.../file'.
  Choose another directory, or free some space there.
.../letters exists and is not a bundle; it is not overwritten. Choose another directory.
.../app exists and is not a bundle; it is not overwritten. Choose another directory.
.../damaged exists and is not a bundle; it is not overwritten. Choose another directory.
.../mixed contains letter, which does not belong to the bundle there; it is not overwritten.
  Choose another directory, or remove it.""",
    )


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*, dir: Path, **_: Any) -> str:
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(tempfile, "mkdtemp", denied)
    assert_expected_inline(
        refused(tmp_path, tmp_path / "bundle"),
        """\
cannot write .../bundle: [Errno 13] Permission denied: '...'.
  Choose another directory, or free some space there.""",
    )


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> int:
        path.write_bytes(text[: len(text) // 2].encode())
        raise OSError(28, "No space left on device")

    write(tmp_path / "bundle", "old")
    before = content(tmp_path)
    monkeypatch.setattr(Path, "write_text", full)
    assert_expected_inline(
        refused(tmp_path, tmp_path / "bundle"),
        """\
cannot write .../bundle: [Errno 28] No space left on device.
  Choose another directory, or free some space there.""",
    )
    with pytest.raises(bw.ExportError, match=r"cannot write .*bundle: .*No space left"):
        add(tmp_path / "bundle")
    assert content(tmp_path) == before


def test_an_empty_folder_and_a_link_are_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "latest").symlink_to("v1")
    for place in ("empty", "latest", "latest"):
        write(tmp_path / place)
    assert (tmp_path / "latest").is_symlink()
    assert content(tmp_path / "empty") == content(tmp_path / "v1") == content(tmp_path / "latest")


@pytest.mark.parametrize(("change", "renames"), [(write, 2), (add, 5)])
def test_an_interrupted_replacement_leaves_what_was_there(
    change: Write, renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "bundle", "old")
    before, rename = content(tmp_path), os.rename
    for count in range(renames):
        calls = iter(range(renames))

        def interrupted(*args: Any, calls: Any = calls, count: int = count) -> None:
            if next(calls, None) == count:
                raise KeyboardInterrupt
            rename(*args)

        with monkeypatch.context() as patched:
            patched.setattr(os, "rename", interrupted)
            with pytest.raises(KeyboardInterrupt):
                change(tmp_path / "bundle")
        assert content(tmp_path) == before
    change(tmp_path / "bundle")
    assert content(tmp_path) != before
