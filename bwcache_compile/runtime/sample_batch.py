"""Which tensors of a call hold the samples of its batch, and the batch sizes at which graphs run."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bwcache_compile.clock import HALF, TimeInput, may_be_time
from bwcache_compile.errors import ConfigError
from bwcache_compile.ir.layout import in_order, memory_order
from bwcache_compile.runtime.signature import CallKey, generation_kind

_MOST_STRUCTURES = 32
"""Kinds of calls of which it is remembered which inputs hold the batch."""


class BatchSizes:
    """The batch sizes at which graphs run: powers of two, and the first whole batch of several samples.

    Attributes:
        used: Those at which one ran.
    """

    def __init__(self) -> None:
        """Know no batch yet."""
        self._whole: int | None = None
        self.used: set[int] = set()

    def size_for(self, count: int, whole: int) -> int:
        """Return the batch size at which `count` samples of a batch run; what is more is padding."""
        if self._whole is None and whole > 1:
            self._whole = whole
        power = 1 << (count - 1).bit_length()
        size = self._whole if self._whole is not None and count <= self._whole < power else power
        self.used.add(size)
        return size

    def up_to(self, whole: int) -> list[int]:
        """Return every size at which the samples of such a batch may run."""
        return sorted({self.size_for(count, whole) for count in range(1, whole + 1)})


class BatchInputs:
    """Remembers which inputs of calls hold the batch: dimension 0 of these had its size at every call."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._known: dict[Hashable, frozenset[int]] = {}

    def find(self, structure: Hashable, flat: Sequence[Any], rows: int | None) -> tuple[int, frozenset[int]]:
        """Return how many samples a call holds, and the positions of the inputs that hold one for each.

        Args:
            structure: Of the call.
            flat: Its leaves.
            rows: How many rows the caller named; None where none are.

        Raises:
            ConfigError: No input holds a batch, or another number of samples.
        """
        tensors = {at: leaf for at, leaf in enumerate(flat) if isinstance(leaf, Tensor) and leaf.dim() > 0}
        if not tensors:
            raise ConfigError("batch_reduce='per_sample' requires an input whose dimension 0 is the batch, and the call has none.")
        largest = max(tensors.values(), key=lambda leaf: (leaf.dim(), leaf.numel()))
        count = largest.shape[0]
        if rows is not None and rows != count:
            raise ConfigError(f"cache_context names {rows} rows, but the batch of the call holds {count} samples.")
        found = frozenset(at for at, leaf in tensors.items() if leaf.shape[0] == count)
        found &= self._known.get(structure, found)
        if len(self._known) >= _MOST_STRUCTURES and structure not in self._known:
            self._known.pop(next(iter(self._known)))
        self._known[structure] = found
        return count, found


@dataclasses.dataclass(frozen=True)
class BatchCall:
    """A call of a batch.

    Attributes:
        flat: Its leaves.
        spec: How they make the arguments.
        count: Samples.
        batched: Positions of the leaves that hold one for each sample.
        key: What the call looks like.
    """

    flat: list[Any]
    spec: Any
    count: int
    batched: frozenset[int]
    key: CallKey

    @property
    def row_signature(self) -> Hashable:
        """What the inputs of one sample's generation have in common."""
        sizes = tuple(size[1:] if at in self.batched and isinstance(size, tuple) else size for at, size in enumerate(self.key.sizes))
        return generation_kind(self.key.kind), sizes

    def gathered(self, order: Sequence[int]) -> list[Any]:
        """Return the leaves of a call with these samples."""
        if list(order) == list(range(self.count)):
            return self.flat
        index: dict[torch.device, Tensor] = {}

        def rows(leaf: Tensor) -> Tensor:
            if leaf.device not in index:
                index[leaf.device] = torch.tensor(order, device=leaf.device)
            chosen, layout = leaf.index_select(0, index[leaf.device]), memory_order(leaf)
            return chosen if layout is None else in_order(chosen, layout)

        return [rows(leaf) if at in self.batched else leaf for at, leaf in enumerate(self.flat)]

    def times(self) -> list[Mapping[Hashable, TimeInput]]:
        """Return the inputs that may be the time, for each sample; each is read once for all."""
        found: list[dict[Hashable, TimeInput]] = [{} for _ in range(self.count)]
        for at, leaf in enumerate(self.flat):
            if not isinstance(leaf, Tensor):
                continue
            dtype, own = str(leaf.dtype).removeprefix("torch."), at in self.batched
            if not may_be_time((1, *leaf.shape[1:]) if own else leaf.shape, dtype):
                continue
            values = _Values(leaf, self.count if own else 1)
            for row, inputs in enumerate(found):
                inputs[at] = TimeInput(leaf.dim(), dtype in HALF, _Read(values, row if own else 0))
        return list(found)


class _Values:
    """The values of an input on the host, read at most once."""

    def __init__(self, tensor: Tensor, rows: int) -> None:
        self._tensor, self._rows = tensor, rows
        self._read: list[list[float]] | None = None

    def row(self, at: int) -> list[float]:
        if self._read is None:
            self._read = self._tensor.detach().reshape(self._rows, -1).tolist()
        return self._read[at]


@dataclasses.dataclass(frozen=True)
class _Read:
    values: _Values
    row: int

    def __call__(self) -> list[float]:
        return self.values.row(self.row)


def parts_of(tensor: Tensor, count: int) -> list[Tensor]:
    """Return what a tensor holds for each of `count` samples along dimension 0, as views."""
    return list(torch.split(tensor, tensor.shape[0] // count)) if count > 1 else [tensor]
