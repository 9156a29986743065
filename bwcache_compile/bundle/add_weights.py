"""Complete a bundle that was exported without its weights. Needs numpy, and no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from bwcache_compile.atomic_write import new_file
from bwcache_compile.bundle.files import ALIGNMENT, MANIFEST, Bundle, file_hash, is_there, open_bundle
from bwcache_compile.bundle.manifest import KeptEntry, Manifest, SourceEntry, WeightSourcesEntry
from bwcache_compile.bundle.tensor_dtypes import DTYPES, FLOATS, converted
from bwcache_compile.errors import BundleError, ConfigError

if TYPE_CHECKING:
    from bwcache_compile.bundle.stored_tensors import StoredTensor

_ADVICE = "Pass the files that it was loaded from. If adapters or layers were fused in it since, save its state dict and pass that file."
_Keys = tuple[str, ...]
_NAMED = 3
"""How many tensors a message names."""


@dataclasses.dataclass
class _Written:
    """The weight file while it is written."""

    file: BinaryIO
    size: int = 0
    digest: Any = dataclasses.field(default_factory=hashlib.sha256)

    def write(self, offset: int, data: Any) -> None:
        """Write bytes at an offset behind what was written so far; the gap holds zeros."""
        for part in (b"\0" * (offset - self.size), data):
            self.file.write(part)
            self.digest.update(part)
        self.size = offset + len(data)


def _listed(found: Sequence[str]) -> str:
    return ", ".join(found[:_NAMED]) + " ..." * (len(found) > _NAMED)


def _found(sources: WeightSourcesEntry, stored: Mapping[str, StoredTensor], source: Path, model: str) -> dict[_Keys, StoredTensor]:
    """Return the stored tensor of each entry, by its keys.

    Raises:
        BundleError: One is missing, of another shape, or of a dtype that does not become the model's.
    """
    total = len(sources.tensors)
    found: dict[_Keys, StoredTensor] = {}
    missing, reshaped, recast = [], [], []
    for entry in sources.tensors:
        key = next((key for key in entry.keys if key in stored), None)
        if key is None:
            missing.append(entry.keys[0])
            continue
        tensor = found[entry.keys] = stored[key]
        if tensor.shape != entry.shape:
            reshaped.append(f"{key} is {list(tensor.shape)} instead of {list(entry.shape)}")
        if tensor.dtype != entry.dtype and not {tensor.dtype, entry.dtype} <= set(FLOATS):
            recast.append(f"{key} is {tensor.dtype} instead of {entry.dtype}")
    for wrong, what in ((missing, "lacks {}"), (reshaped, "has other shapes for {}"), (recast, "has other dtypes for {}")):
        if wrong:
            counted = what.format(f"{len(wrong)} of {total} tensors")
            raise BundleError(f"{source} {counted} of the {model} that was exported:\n  {_listed(wrong)}\n  {_ADVICE}")
    return found


def _bytes(entry: SourceEntry, tensor: StoredTensor) -> memoryview:
    """Return the bytes of a stored tensor in the model's dtype and the weight file's order."""
    import numpy as np

    values = tensor.read()
    if tensor.dtype != entry.dtype:
        values = converted(values, tensor.dtype, entry.dtype)
    laid: Any = np.ascontiguousarray(values.reshape(entry.shape).transpose(entry.order))
    return memoryview(laid.reshape(-1).view("u1"))


def _size(part: SourceEntry | KeptEntry) -> int:
    return part.bytes if isinstance(part, KeptEntry) else math.prod(part.shape) * DTYPES.get(part.dtype, 0)


def _parts(bundle: Bundle, sources: WeightSourcesEntry) -> list[SourceEntry | KeptEntry]:
    """Return the parts of the weight file in its order.

    Raises:
        BundleError: They overlap, leave gaps, or are more or less than the file.
    """
    files, end = bundle.manifest.files, 0
    every: list[SourceEntry | KeptEntry] = [*sources.tensors, *sources.kept]
    parts = sorted(every, key=lambda part: (part.offset, _size(part)))
    right = sum(part.bytes for part in sources.kept) == (files[sources.constants].bytes if sources.constants else 0)
    for entry in sources.tensors:
        right &= bool(entry.keys) and entry.dtype in DTYPES and sorted(entry.order) == list(range(len(entry.shape)))
    for part in parts:
        right &= 0 <= part.offset - end < ALIGNMENT and _size(part) >= 0
        end = part.offset + _size(part)
    if not right or end != files[sources.file].bytes:
        raise BundleError(f"{bundle.folder / MANIFEST}: weight_sources do not describe {sources.file}.")
    return parts


def _write(
    bundle: Bundle,
    sources: WeightSourcesEntry,
    parts: Sequence[SourceEntry | KeptEntry],
    found: Mapping[_Keys, StoredTensor],
    source: Path,
    file: BinaryIO,
) -> None:
    """Write the weight file.

    Raises:
        BundleError: It is not the one that was exported.
    """
    written, differ = _Written(file), []
    constants = memoryview((bundle.folder / sources.constants).read_bytes() if sources.constants else b"")
    for part in parts:
        if isinstance(part, KeptEntry):
            data, constants = constants[: part.bytes], constants[part.bytes :]
        else:
            data = _bytes(part, found[part.keys])
            differ += [part.keys[0]] if hashlib.sha256(data).hexdigest() != part.sha256 else []
        if len(differ) == _NAMED:
            break
        if not differ:
            written.write(part.offset, data)
    if differ:
        raise BundleError(
            f"{source} has other weights than the {bundle.manifest.model} that was exported:\n  {', '.join(differ)}"
            f"{' and perhaps more' * (len(differ) == _NAMED)}\n  {_ADVICE}\n  For other weights export the model that has them: the graphs"
            " hold constants that may follow from weights."
        )
    if written.digest.hexdigest() != bundle.manifest.files[sources.file].sha256:
        raise BundleError(f"{bundle.folder / MANIFEST}: weight_sources do not describe {sources.file}, whose SHA-256 would be another one.")


def add_weights(directory: str | Path, source: str | Path) -> Manifest:
    """Add the weights to a bundle that was exported with `include_weights=False`, from the model's own files.

    Afterwards the bundle has its weight file, with the size and the SHA-256 that its manifest lists: the one that a full export writes.
    No other file is changed, and a weight file that is there and right is left alone. Tensors are read one by one; floats of another dtype
    than the model had when it was exported are rounded to its dtype as torch does. Needs numpy.

    Args:
        directory: The bundle.
        source: A safetensors file, an index of shards (`*.safetensors.index.json`), or a folder that holds one of them, such as the
            folder `transformer` of a model repository.

    Returns:
        The bundle's manifest.

    Raises:
        BundleError: The bundle was exported with its weights or is damaged, a tensor is missing in the files, has another shape or other
            values than the model had, or the weight file cannot be written. The bundle is as it was.
        ConfigError: numpy is not installed.
    """
    try:
        from bwcache_compile.bundle.stored_tensors import stored_tensors
    except ModuleNotFoundError as error:
        raise ConfigError("add_weights needs numpy: pip install numpy.") from error
    folder = Path(directory)
    bundle = open_bundle(folder, weights=False)
    sources = bundle.manifest.weight_sources
    if sources is None:
        raise BundleError(
            f"{folder} was exported with its weights; there are none to add. To leave them out, export with include_weights=False."
        )
    path, entry = folder / sources.file, bundle.manifest.files[sources.file]
    if not is_there(folder, sources.file) or file_hash(path) != entry.sha256:
        parts = _parts(bundle, sources)
        found = _found(sources, stored_tensors(source), Path(source), bundle.manifest.model)
        try:
            with new_file(path) as file:
                _write(bundle, sources, parts, found, Path(source), file)
        except OSError as error:
            raise BundleError(f"cannot write {path}: {error}.") from error
    return open_bundle(folder, verify_hashes=False).manifest  # the weights were hashed a moment ago
