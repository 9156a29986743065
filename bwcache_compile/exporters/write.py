"""Write bundles atomically: files take their place when all are complete, and only a bundle is replaced. Needs no torch."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from bwcache_compile.bundle.files import FORMAT, MANIFEST, VERSION, file_hash
from bwcache_compile.bundle.manifest import FileEntry, Manifest
from bwcache_compile.bundle.manifest_text import write_text
from bwcache_compile.errors import ExportError
from bwcache_compile.new_folder import new_folder


def _written(manifest: Manifest, files: dict[str, FileEntry]) -> str:
    described = dataclasses.replace(manifest, files=files)
    return write_text({"format": FORMAT, "format_version": VERSION, **described.to_json()})


def write_manifest(folder: Path, manifest: Manifest, known: Mapping[str, FileEntry]) -> None:
    """Describe every file of a folder and write the manifest, which is what makes it a bundle.

    Args:
        folder: Holds the other files of the bundle.
        manifest: What to write; its list of files is made here.
        known: Descriptions of files that need not be read once more.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {name: known.get(name) or _described(path) for name, path in paths.items()}
    (folder / MANIFEST).write_text(_written(manifest, files))


def add_files(folder: Path, texts: dict[str, str], manifest: Manifest) -> None:
    """Put text files into a bundle with a manifest that names them beside its own; all of it or nothing.

    Raises:
        ExportError: The folder cannot be written to.
    """
    with replaced_together(folder) as place:
        for name, text in texts.items():
            (place / name).write_text(text)
        added = {name: _described(place / name) for name in texts}
        (place / MANIFEST).write_text(_written(manifest, {**manifest.files, **added}))


def _described(path: Path) -> FileEntry:
    return FileEntry(bytes=path.stat().st_size, sha256=file_hash(path))


@contextlib.contextmanager
def replaced_together(folder: Path) -> Iterator[Path]:
    """Yield a folder to write files to; at the end they replace the files of the same names in `folder`, unless there was an error.

    Raises:
        ExportError: The folder cannot be written to. Every file there is what it was.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_named_failures(folder))
        folder.mkdir(parents=True, exist_ok=True)
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix=".new.", dir=folder))
        new, old = Path(place, "new"), Path(place, "old")
        new.mkdir()
        old.mkdir()
        yield new
        names = [path.name for path in new.iterdir()]
        try:
            for name in names:
                if (folder / name).exists():
                    os.rename(folder / name, old / name)
                os.rename(new / name, folder / name)
        except BaseException:
            for name in names:
                if (old / name).exists():
                    os.replace(old / name, folder / name)
                elif not (new / name).exists():
                    (folder / name).unlink()
            raise


@contextlib.contextmanager
def _named_failures(target: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ExportError(f"cannot write {target}: {error}.\n  Choose another directory, or free some space there.") from error


def _refuse_others(target: Path) -> None:
    """Refuse to replace what no export wrote.

    Raises:
        ExportError: There is something else, or something beside a bundle.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    try:
        manifest = json.loads((target / MANIFEST).read_bytes())
        files = {MANIFEST, *manifest["files"]} if manifest["format"] == FORMAT else set()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        files = set()
    if not files:
        raise ExportError(f"{target} exists and is not a bundle; it is not overwritten. Choose another directory.")
    folders = {parent.as_posix() for name in files for parent in PurePosixPath(name).parents}
    names = {path.relative_to(target).as_posix() for path in target.rglob("*")}
    others = sorted(names - files - folders)
    if others:
        raise ExportError(
            f"{target} contains {', '.join(others[:3])}, which does not belong to the bundle there; it is not overwritten.\n"
            "  Choose another directory, or remove it."
        )


@contextlib.contextmanager
def new_bundle(directory: str | Path) -> Iterator[Path]:
    """Yield a folder to write to; at the end it replaces `directory`, or is removed if there was an error.

    Raises:
        ExportError: `directory` holds something that is no bundle's, or cannot be written to.
    """
    with _named_failures(directory):
        target = Path(directory).resolve()  # a link stays one
        _refuse_others(target)
        with new_folder(target) as folder:
            yield folder
