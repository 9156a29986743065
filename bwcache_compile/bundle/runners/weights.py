"""Weights of a bundle as tensors, from the one file that holds them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from bwcache_compile.bundle.manifest import WeightEntry
from bwcache_compile.errors import BundleError


def _read(data: Tensor, entry: WeightEntry) -> Tensor:
    shape, order, dtype = entry.shape, entry.order, getattr(torch, entry.dtype)
    dense = [shape[dimension] for dimension in order]
    end = entry.offset + math.prod(shape) * dtype.itemsize
    if sorted(order) != list(range(len(shape))) or not 0 <= entry.offset <= end <= data.numel():
        raise ValueError(f"bytes {entry.offset} to {end} are outside the file's {data.numel()} bytes")
    flat = data[entry.offset : end].view(dtype) if end > entry.offset else torch.empty(0, dtype=dtype)
    return flat.view(dense).permute([order.index(dimension) for dimension in range(len(shape))])


def read_weights(path: Path, described: Mapping[str, WeightEntry]) -> dict[str, Tensor]:
    """Map a weight file into memory: tensors by name, lying as those that were added. None is copied.

    Raises:
        BundleError: A description does not fit the file.
    """
    size, tensors = path.stat().st_size, {}
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)
    for name, entry in described.items():
        try:
            tensors[name] = _read(data, entry)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise BundleError(f"{path.parent / 'manifest.json'}: invalid entry for the weight {name} in {path.name}: {error}.") from error
    return tensors
