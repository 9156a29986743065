"""A bundle: a folder with graphs, one weight file and a manifest that says all there is to know about them. Needs no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Collection
from pathlib import Path

from bwcache_compile.bundle.agreement import disagreement, missing_outputs, sequence_fault
from bwcache_compile.bundle.external_data import external_locations
from bwcache_compile.bundle.manifest import FileEntry, Manifest, PlacedEntry
from bwcache_compile.bundle.manifest_text import read_text
from bwcache_compile.errors import BundleError

FORMAT = "bwcache-bundle"
VERSION = 2
MANIFEST = "manifest.json"
ALIGNMENT = 4096
"""Where a tensor may begin in a weight file, in bytes: at a page."""
DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64")
FORMATS = ("onnx", "pt2", "aoti")


@dataclasses.dataclass(frozen=True)
class Bundle:
    """An opened bundle, every file of which was verified: but for the weights, where they were not asked for.

    Attributes:
        folder: Where it is.
        manifest: What `manifest.json` says.
    """

    folder: Path
    manifest: Manifest

    def graph_file(self, kind: str) -> Path:
        """Return the path of a graph that is one file.

        Raises:
            BundleError: The bundle has none of that kind.
        """
        graphs = self.manifest.graphs
        if kind not in graphs:
            raise BundleError(f"{self.folder} has the graphs {', '.join(graphs)}, but no {kind} graph. Export it with guarded=True.")
        file = graphs[kind].file
        assert file is not None, "sequences are opened call by call"
        return self.folder / file


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(2**20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        content = read_text(path.read_bytes())
    except FileNotFoundError as error:
        raise BundleError(f"{path} does not exist: {folder} is not a bundle.") from error
    except NotADirectoryError as error:
        raise BundleError(f"{folder} is a file. Pass the folder that export wrote.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"cannot read {path}: {error}.") from error
    if content.pop("format", None) != FORMAT:
        raise BundleError(f"{path} is not the manifest of a bundle.")
    version = content.pop("format_version", None)
    if type(version) is not int or version < 1:
        raise BundleError(f"{path}: format_version must be an integer, got {version!r}.")
    if version < VERSION:
        raise BundleError(
            f"{path} has format version {version}, but this version of bwcache-compile reads {VERSION}. Export the model again."
        )
    if version > VERSION:
        raise BundleError(
            f"{path} has format version {version}, but this version of bwcache-compile reads up to {VERSION}. Upgrade bwcache-compile."
        )
    try:
        manifest = Manifest.from_json(content, "manifest")
    except ValueError as error:
        raise BundleError(f"{path}: {error}.") from error
    wrong = disagreement(manifest)
    if wrong is not None:
        raise BundleError(f"{path}: {wrong}.")
    if manifest.graph_format not in FORMATS:
        raise BundleError(f"{path}: graph_format must be one of {', '.join(FORMATS)}, got {manifest.graph_format!r}.")
    return manifest


def _check_tensors(path: Path, manifest: Manifest) -> None:
    """Check the dtypes and shapes of inputs, outputs and slots."""
    for entry in (*manifest.inputs, *manifest.outputs.items, *manifest.slots):
        if entry.dtype not in DTYPES:
            raise BundleError(f"{path}: {entry.name} has unsupported dtype {entry.dtype!r}; supported are {', '.join(DTYPES)}.")
        if any(isinstance(size, int) and size < 0 for size in entry.shape):
            raise BundleError(f"{path}: {entry.name} has an invalid shape {list(entry.shape)}.")


def is_there(folder: Path, name: str) -> bool:
    """Whether a folder has a file of this name, and no link on the way to it."""
    parts = name.split("/")
    try:
        return (folder / name).is_file() and not any(folder.joinpath(*parts[: i + 1]).is_symlink() for i in range(len(parts)))
    except OSError:  # no name that the file system takes
        return False


def _check_name(folder: Path, name: str) -> None:
    if any(part != Path(part).name or part in ("", ".", "..") or "\\" in part for part in name.split("/")):
        raise BundleError(f"{folder / MANIFEST} refers to {name!r}, which is outside the bundle.")


def _check_file(folder: Path, name: str, entry: FileEntry, verify_hash: bool) -> None:
    path = folder / name
    if not is_there(folder, name):
        raise BundleError(f"{path} is missing; the bundle is incomplete. Copy it again, or export it again.")
    size = path.stat().st_size
    if size != entry.bytes:
        raise BundleError(
            f"{path} has {size} bytes, expected {entry.bytes}: the file is {'truncated' if size < entry.bytes else 'altered'}."
            " Copy it again, or export it again."
        )
    if verify_hash and file_hash(path) != entry.sha256:
        raise BundleError(f"SHA-256 mismatch for {path}: the file was changed after export. Copy it again, or export it again.")


def _check_sources(folder: Path, manifest: Manifest, directory: str | Path, needed: bool) -> None:
    """Check that a bundle which was exported without its weights has them now, if they are needed."""
    sources = manifest.weight_sources
    if sources is None:
        return
    for name in (sources.file, sources.constants):
        if name is not None and name not in manifest.files:
            raise BundleError(f"{folder / MANIFEST}: weight_sources names {name!r}, which is not among the bundle's files.")
    if needed and not os.path.lexists(folder / sources.file):
        raise BundleError(
            f"{folder} was exported without its weights, and {sources.file} was not added since. Write it from the model's safetensors"
            f" files: bwcache add-weights {folder} SOURCE, or bwcache_compile.add_weights({str(directory)!r}, SOURCE)."
        )


def _check_graphs(folder: Path, manifest: Manifest) -> None:
    path, files, graphs = folder / MANIFEST, manifest.files, manifest.graphs
    onnx = manifest.graph_format == "onnx"
    if not {"compute", "reuse"} <= set(graphs):
        raise BundleError(f"{path} does not list a compute and a reuse graph.")
    for kind, entry in graphs.items():
        if (entry.file is None) == (entry.sequence is None) or (onnx and entry.sequence is not None):
            raise BundleError(f"{path}: the {kind} graph must be {'one file' if onnx else 'either one file or a sequence of calls'}.")
        if not set(entry.files) <= files.keys():
            raise BundleError(f"{path}: the file of the {kind} graph is not among the bundle's files.")
        fault = None if entry.sequence is None else sequence_fault(entry)
        if fault is not None:
            raise BundleError(f"{path}: the {kind} graph is no sequence of calls: {fault}.")
        if entry.weights is None and entry.file is not None and not onnx:
            raise BundleError(f"{path} does not list the weights of the {kind} graph.")
        lacking = missing_outputs(manifest, kind)
        if lacking:
            raise BundleError(f"{path}: the {kind} graph lacks the outputs {', '.join(lacking)}.")
        if onnx:
            _check_locations(folder / entry.files[0], files)
    if not onnx:
        _check_layout(path, manifest)


def _check_locations(path: Path, files: Collection[str]) -> None:
    """Check that an ONNX model reads weights from the bundle's files alone."""
    try:
        locations = external_locations(path.read_bytes())
    except ValueError as error:
        raise BundleError(f"{path} is not an ONNX model: {error}.") from error
    for location in sorted(locations):
        if location not in files:
            raise BundleError(f"{path} reads weights from {location!r}, which is not among the bundle's files.")


def _check_layout(path: Path, manifest: Manifest) -> None:
    """Check what only torch's formats say: the device, the weights, and how tensors lie in memory."""
    if manifest.device is None:
        raise BundleError(f"{path} has no device.")
    if manifest.weights is None or manifest.weights.file not in manifest.files:
        raise BundleError(f"{path} has no entry for the weights.")
    taken: list[PlacedEntry] = [*manifest.inputs, *manifest.slots]
    for entry in taken:
        if entry.order is None or sorted(entry.order) != list(range(len(entry.shape))):
            raise BundleError(f"{path} has no memory layout for {entry.name}.")


def open_bundle(directory: str | Path, *, verify_hashes: bool = True, weights: bool = True) -> Bundle:
    """Read a bundle's manifest and verify every file against it. No code of the bundle runs.

    Args:
        directory: The bundle.
        verify_hashes: Compare the SHA-256 of every file, which reads each whole. Sizes are always compared.
        weights: Whether a bundle that was exported without its weights must have them by now. False is for what reads the manifest and
            the graphs alone: the weights of such a bundle are not looked at.

    Raises:
        BundleError: A file is missing, truncated or altered, the manifest is damaged or of a newer version, or a graph
            reads weights from outside the folder. The message names the file.
    """
    folder = Path(directory)
    manifest = _read_manifest(folder)
    _check_sources(folder, manifest, directory, weights)
    sources = manifest.weight_sources
    unread = sources.file if sources is not None and not weights else None
    for name, entry in manifest.files.items():
        _check_name(folder, name)
        if name != unread:
            _check_file(folder, name, entry, verify_hashes)
    _check_tensors(folder / MANIFEST, manifest)
    _check_graphs(folder, manifest)
    return Bundle(folder, manifest)
