"""Say of each part of a weight file which tensor of the model's state dict it is, so that a bundle can do without the file.

Tensors are told by their memory, as the exporters pass the model's own on, and those of which they made copies by their bytes. Either
way the bytes are hashed: what is said here makes the very file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bwcache_compile.bundle.manifest import KeptEntry, SourceEntry, WeightSourcesEntry
from bwcache_compile.bundle.tensor_dtypes import DTYPES
from bwcache_compile.errors import ExportError, warn
from bwcache_compile.exporters.describe import dtype_name
from bwcache_compile.exporters.weights import Piece, WeightFile, bytes_of
from bwcache_compile.ir.layout import Order, memory_order, slot_order
from bwcache_compile.ir.torch_compat import is_traceable_wrapper_subclass
from bwcache_compile.printing import bytes_text

CONSTANTS = "constants.bin"
_WARN_ABOVE, _WORTH_SAYING = 0.05, 2**20
"""What may stay in the bundle without a warning: this share of the weights, or so many bytes. Most models make some tables."""

_Place = tuple[int, int, int]


def _storable(tensor: Tensor) -> bool:
    """Whether a tensor has values, and ones that a safetensors file can hold."""
    return tensor.layout is torch.strided and not tensor.is_meta and dtype_name(tensor.dtype) in DTYPES


def _place(tensor: Tensor) -> _Place:
    """Say where a tensor lies: its storage, where it begins there, and its size."""
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()) * tensor.itemsize, tensor.nbytes


def _order_in(view: Tensor, tensor: Tensor) -> Order | None:
    """Return the order of a tensor's dimensions in a view of the same memory; None where a dimension was split or the tensor has gaps."""
    if memory_order(tensor) is None or view.dtype != tensor.dtype:
        return None
    left = [d for d in range(tensor.dim()) if tensor.shape[d] > 1]
    order: list[int] = []
    for size, stride in zip(view.shape, view.stride(), strict=True):
        inside = [d for d in left if stride <= tensor.stride(d) < stride * size]
        order += sorted(inside, key=tensor.stride, reverse=True)
        left = [d for d in left if d not in inside]
    return None if left else (*order, *(d for d in range(tensor.dim()) if d not in order))


class _StateDict:
    """The tensors of a state dict, found by where they lie or by their bytes."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {key: tensor for key, tensor in tensors.items() if _storable(tensor)}
        self._by_place: dict[_Place, list[str]] = {}
        self._by_size: dict[int, list[str]] = {}
        for key, tensor in self._tensors.items():
            self._by_place.setdefault(_place(tensor), []).append(key)
            self._by_size.setdefault(tensor.nbytes, []).append(key)
        self._by_bytes: dict[int, dict[str, tuple[str, Order]]] = {}

    def source_of(self, piece: Piece) -> SourceEntry | None:
        """Return which tensor a part of the weight file is; None if it is none of them."""
        found = self._found(piece)
        if found is None:
            return None
        key, order = found
        tensor = self._tensors[key]
        tied = [other for other in self._by_place[_place(tensor)] if self._equal(self._tensors[other], tensor)]
        return SourceEntry(
            offset=piece.offset,
            keys=tuple(tied),
            dtype=dtype_name(tensor.dtype),
            shape=tuple(tensor.shape),
            order=order,
            sha256=piece.sha256,
        )

    @staticmethod
    def _equal(one: Tensor, other: Tensor) -> bool:
        """Whether two tensors at one place are the same: of one dtype, shape and layout."""
        return (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())

    def _found(self, piece: Piece) -> tuple[str, Order] | None:
        for key in self._by_place.get(_place(piece.view), ()) if piece.view is not None else ():
            assert piece.view is not None
            order = _order_in(piece.view, self._tensors[key])
            if order is not None and _hash(self._tensors[key], order) == piece.sha256:
                return key, order
        return self._of_size(piece.bytes).get(piece.sha256)

    def _of_size(self, size: int) -> Mapping[str, tuple[str, Order]]:
        """Return the tensors of a size by their hashes, as they are, as they lie, and transposed."""
        if size not in self._by_bytes:
            known = self._by_bytes[size] = {}
            for key in self._by_size.get(size, ()):
                tensor = self._tensors[key]
                plain = tuple(range(tensor.dim()))
                for order in dict.fromkeys((plain, slot_order(tensor), plain[::-1])):
                    known.setdefault(_hash(tensor, order), (key, order))
        return self._by_bytes[size]


def _hash(tensor: Tensor, order: Order) -> str:
    return hashlib.sha256(bytes_of(tensor, order)).hexdigest()


def plain_tensors(state_dict: Mapping[str, object]) -> dict[str, Tensor]:
    """Return the tensors of a model's state dict under the names that its files have.

    Raises:
        ExportError: One is made of several tensors, as quantized weights are.
    """
    tensors = {}
    for key, value in state_dict.items():
        if not isinstance(value, Tensor):
            continue
        if is_traceable_wrapper_subclass(value):
            raise ExportError(
                f"weight {key} is of type {type(value).__name__}, which is made of several tensors, and a safetensors file of the model"
                " holds other ones. Export with include_weights=True."
            )
        tensors[".".join(part for part in key.split(".") if part != "_orig_mod")] = value  # of a compiled module
    return tensors


def _chunks(path: Path, pieces: Sequence[Piece]) -> Iterator[bytes]:
    with path.open("rb") as file:
        for piece in pieces:
            file.seek(piece.offset)
            yield file.read(piece.bytes)


def keep_the_rest(weights: WeightFile, state_dict: Mapping[str, Tensor], model_name: str) -> WeightSourcesEntry:
    """Describe a weight file by the tensors of a state dict, and write beside it what is not among them.

    Warns if that is more than a few percent of the file, and not just some tables.

    Args:
        weights: The file, complete.
        state_dict: See `plain_tensors`.
        model_name: For the warning.
    """
    known = _StateDict(state_dict)
    found = [(piece, known.source_of(piece)) for piece in weights.pieces]
    kept = [piece for piece, source in found if source is None]
    if kept:
        with (weights.path.parent / CONSTANTS).open("wb") as file:
            file.writelines(_chunks(weights.path, kept))
    size, total = sum(piece.bytes for piece in kept), sum(piece.bytes for piece in weights.pieces)
    if size > max(_WARN_ABOVE * total, _WORTH_SAYING):
        largest = sorted(kept, key=lambda piece: piece.bytes, reverse=True)[:3]
        listed = ", ".join(f"{piece.name} ({bytes_text(piece.bytes)})" for piece in largest)
        warn(
            f"{size / total:.0%} of the weights of {model_name} ({bytes_text(size)}) stay in the bundle, in {CONSTANTS}: they are no"
            f" tensors of its state dict, so no file of the model has them. The largest: {listed}."
        )
    return WeightSourcesEntry(
        file=weights.path.name,
        tensors=tuple(source for _, source in found if source is not None),
        kept=tuple(KeptEntry(offset=piece.offset, bytes=piece.bytes) for piece in kept),
        constants=CONSTANTS if kept else None,
    )
