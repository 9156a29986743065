"""Write every weight once to one file, however many graphs read it.

safetensors would do for torch's formats alone: ONNX graphs map the file at offsets that must be aligned to pages, weights keep the order of
their dimensions in memory, and the file is written while the tensors are still being made, so that none is held twice.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
from pathlib import Path
from types import TracebackType

from torch import Tensor

from bwcache_compile.bundle.files import ALIGNMENT
from bwcache_compile.bundle.manifest import FileEntry, WeightEntry
from bwcache_compile.errors import ExportError
from bwcache_compile.ir.layout import Order, in_order, slot_order
from bwcache_compile.ir.torch_compat import is_traceable_wrapper_subclass

WEIGHTS = "weights.bin"


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of the weight file.

    Attributes:
        name: Of a weight that it is; there may be others.
        offset: Where it begins, in bytes.
        bytes: How long it is.
        sha256: Of these bytes.
        view: The tensor that was written, its dimensions in the order of the file; None where it was no tensor of torch.
    """

    name: str
    offset: int
    bytes: int
    sha256: str
    view: Tensor | None


def bytes_of(tensor: Tensor, order: Order) -> bytes:
    """Return a tensor's bytes with its dimensions in that order."""
    dense = in_order(tensor.detach(), order).permute(order).cpu()
    return ctypes.string_at(dense.data_ptr(), dense.nbytes) if dense.numel() else b""


class WeightFile:
    """A file that holds every weight once, however many graphs read it.

    Attributes:
        path: Where it is.
        described: What was added, by name.
        pieces: What is in it, in the order of the file.
    """

    def __init__(self, path: Path) -> None:
        """Start an empty file."""
        self.path = path
        self._file = path.open("wb")
        self._hash, self._size = hashlib.sha256(), 0
        self._places: dict[tuple[str, int], int] = {}
        self._named: dict[str, Tensor] = {}
        self.described: dict[str, WeightEntry] = {}
        self.pieces: list[Piece] = []

    def __enter__(self) -> WeightFile:
        """Keep it open for writing."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Finish the file."""
        self._file.close()

    def place(self, data: bytes, name: str, view: Tensor | None) -> int:
        """Return where these bytes are in the file, after writing them if they are new; `name` and `view` say what they are."""
        key = (hashlib.sha256(data).hexdigest(), len(data))
        if key not in self._places:
            self._write(b"\0" * (-self._size % ALIGNMENT))
            self._places[key] = self._size
            self.pieces.append(Piece(name, self._size, len(data), key[0], view))
            self._write(data)
        return self._places[key]

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)

    @property
    def entry(self) -> dict[str, FileEntry]:
        """What the manifest says of the file as it is now, by its name."""
        return {self.path.name: FileEntry(bytes=self._size, sha256=self._hash.hexdigest())}

    def flush(self) -> None:
        """Let others read what was written so far."""
        self._file.flush()

    def add(self, name: str, tensor: Tensor) -> str:
        """Write a tensor and describe it for a reader; return its name, which is another where two tensors have the same.

        Raises:
            ExportError: The tensor is made of others, as quantized weights are.
        """
        if is_traceable_wrapper_subclass(tensor):
            raise ExportError(
                f"weight {name} is of type {type(tensor).__name__}, which is made of several tensors. Files of torch hold plain tensors:"
                " call torchao.utils.unwrap_tensor_subclass(model) before bwcache_compile.transform. ONNX needs no such call."
            )
        while name in self._named and self._named[name] is not tensor:
            name += "_"
        if name not in self._named:
            self._named[name] = tensor
            order = slot_order(tensor)
            offset = self.place(bytes_of(tensor, order), name, tensor.detach().permute(order))
            dtype = str(tensor.dtype).removeprefix("torch.")
            self.described[name] = WeightEntry(
                dtype=dtype, shape=tuple(tensor.shape), order=tuple(order), offset=offset, grad=tensor.requires_grad
            )
        return name
