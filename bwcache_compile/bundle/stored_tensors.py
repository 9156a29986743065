"""Read the tensors of a safetensors file, or of shards with an index. Needs numpy, and no torch.

The numpy interface of the safetensors library has no bfloat16, in which most models are stored. A file is a JSON header and bytes; both are
read here, each tensor by a map of its bytes into memory.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bwcache_compile.bundle.tensor_dtypes import STORED, words
from bwcache_compile.errors import BundleError

_SUFFIX, _INDEX = ".safetensors", ".safetensors.index.json"
_LONGEST_HEADER = 10**8
"""Bytes. The safetensors library takes no longer one either."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file.

    Attributes:
        file: Where it is.
        dtype: As torch names it.
        shape: Its own.
        start: Where its bytes begin in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    def read(self) -> Any:
        """Return its values as they are stored, uint8 to uint64[n] (see `words`). They are mapped, not read.

        Raises:
            BundleError: The file cannot be read.
        """
        count = math.prod(self.shape)
        try:
            return np.memmap(self.file, words(self.dtype), "r", self.start, (count,)) if count else np.empty(0, words(self.dtype))
        except (OSError, ValueError) as error:
            raise BundleError(f"cannot read {self.file}: {error}.") from error


def _json(path: Path, data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is damaged: {error}.") from error
    if not isinstance(content, dict):
        raise BundleError(f"{path} is damaged: expected a JSON object, got {repr(content)[:60]}.")
    return content


def _tensor(path: Path, key: str, entry: Any, data_start: int, size: int) -> StoredTensor:
    try:
        stored, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        dtype, width = STORED.get(stored, (str(stored), 0))
        right = all(type(number) is int and number >= 0 for number in (*shape, start, end))
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path} is damaged: invalid entry for the tensor {key}.") from error
    if not right or (width and end - start != math.prod(shape) * width):
        raise BundleError(f"{path} is damaged: invalid entry for the tensor {key}.")
    if data_start + end > size:
        raise BundleError(f"{path} has {size} bytes, but the tensor {key} ends at {data_start + end}: the file is truncated.")
    return StoredTensor(path, dtype, shape, data_start + start)


def _of_file(path: Path) -> dict[str, StoredTensor]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise BundleError(f"{path} is not a safetensors file, or it is truncated.")
            header = _json(path, file.read(length))
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error}.") from error
    return {key: _tensor(path, key, entry, 8 + length, size) for key, entry in header.items() if key != "__metadata__"}


def _of_shards(index: Path) -> dict[str, StoredTensor]:
    try:
        places = _json(index, index.read_bytes()).get("weight_map")
    except OSError as error:
        raise BundleError(f"cannot read {index}: {error}.") from error
    if not isinstance(places, dict) or not all(isinstance(name, str) and name == os.path.basename(name) for name in places.values()):
        raise BundleError(f"{index} is not an index of shards: its weight_map names no files beside it.")
    names = sorted(set(places.values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise BundleError(f"{index.parent} lacks {_listed(missing)} of the {len(names)} shards that {index.name} lists.")
    shards = {name: _of_file(index.parent / name) for name in names}
    return {key: shards[name][key] for key, name in places.items() if key in shards[name]}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _chosen(folder: Path) -> Path:
    """Return the one file of a folder, or its index of shards."""
    for suffix in (_INDEX, _SUFFIX):
        found = sorted(path for path in folder.iterdir() if path.name.endswith(suffix))
        if len(found) == 1:
            return found[0]
        if found:
            raise BundleError(f"{folder} holds {_listed([path.name for path in found])}. Pass one of these files.")
    inside = sorted(path.name for path in folder.iterdir() if path.is_dir() and any(path.glob(f"*{_SUFFIX}")))
    elsewhere = f" Its folders {_listed(inside)} hold some: pass the one of the model." if inside else ""
    raise BundleError(f"{folder} holds no safetensors file and no index of shards.{elsewhere}")


def stored_tensors(source: str | Path) -> Mapping[str, StoredTensor]:
    """Return every tensor of a model's files by its name. Only headers are read.

    Args:
        source: A safetensors file, an index of shards (`*.safetensors.index.json`), or a folder that holds one of them.

    Raises:
        BundleError: There is none, there are several to choose from, or a file is missing or damaged. The message names the file.
    """
    path = Path(source)
    try:
        path = _chosen(path) if path.is_dir() else path
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error}.") from error
    return _of_shards(path) if path.name.endswith(".json") else _of_file(path)
