"""What a bundle's `manifest.json` says, typed: written by the exporter, read by sessions and every other tool. Needs no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from bwcache_compile.bundle.entries import Entry
from bwcache_compile.config import CacheConfig

Size = int | str
"""A number, or arithmetic over the manifest's symbols."""
Constant = bool | int | float | str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorEntry(Entry):
    """A tensor: `dtype` as numpy names it, its shape where sizes may be open."""

    name: str
    dtype: str
    shape: tuple[Size, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacedEntry(TensorEntry):
    """A tensor that a graph takes.

    Attributes:
        example: Its shape when the model was captured.
        order: How it lies in memory: its dimensions from the slowest to the fastest. For torch's formats alone.
    """

    example: tuple[int, ...]
    order: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputEntry(PlacedEntry):
    """A tensor that a call passes.

    Attributes:
        argument: Which argument of the model's forward holds it.
        path: Keys and indices to it inside of that argument.
    """

    argument: str
    path: tuple[int | str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotEntry(PlacedEntry):
    """A tensor of the cache state: what it is for (see `CacheSlot`), and the number that it holds everywhere at first."""

    role: str
    fill: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConstantEntry(Entry):
    """An argument that is no tensor, whose value is built into the graphs."""

    argument: str
    path: tuple[int | str, ...]
    value: Constant


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueEntry(Entry):
    """The values of an input, as one flat list, that are built into the graphs."""

    input: str
    value: tuple[bool | int | float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputsEntry(Entry):
    """What the model returns.

    Attributes:
        form: How tensors and constants are put together: a table with one entry, what it is and what is in it.
        items: The tensors.
    """

    form: Mapping[str, Any]
    items: tuple[TensorEntry, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SymbolEntry(Entry):
    """A dynamic size: `factor * symbol + offset` is what an input has in that dimension. `example` is its value at the capture."""

    name: str
    input: str
    dimension: int
    example: int
    factor: int
    offset: int

    @property
    def place(self) -> str:
        """Where it is read, as users write it: `x[1]`."""
        return f"{self.input}[{self.dimension}]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockEntry(Entry):
    """A cached block: the path of the module and its class."""

    name: str
    type: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallEntry(Entry):
    """One call of a package in a sequence.

    Attributes:
        file: The package, in the bundle.
        weights: Those that it takes before its inputs.
        inputs: Names of the values that it takes: inputs of the graph, or what earlier calls returned.
        outputs: Names of the values that it returns.
        block: The block that it is; None for what stands around the blocks.
    """

    file: str
    weights: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    block: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceEntry(Entry):
    """A graph as calls of packages.

    Attributes:
        calls: In the order in which they run.
        returned: Names of the values that are the graph's outputs, in their order.
    """

    calls: tuple[CallEntry, ...]
    returned: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphEntry(Entry):
    """A graph's file or its calls of packages, and the names of what it takes and returns, in order.

    Attributes:
        file: In the bundle; None for a sequence.
        inputs: Without the weights.
        outputs: All of them.
        weights: Those that it takes before its inputs. For torch's formats alone, and not for a sequence, whose calls take them.
        sequence: The calls of packages that it is. For format "aoti" alone.
    """

    file: str | None = None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...] | None = None
    sequence: SequenceEntry | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """The files that it runs, each once."""
        calls = self.sequence.calls if self.sequence else ()
        return tuple(dict.fromkeys(([self.file] if self.file is not None else []) + [call.file for call in calls]))

    @property
    def weights_read(self) -> tuple[str, ...]:
        """The weights that it takes, by itself or in its calls, each once."""
        calls = self.sequence.calls if self.sequence else ()
        return tuple(dict.fromkeys([*(self.weights or ()), *(name for call in calls for name in call.weights)]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileEntry(Entry):
    """A file's size and hash."""

    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightEntry(Entry):
    """A weight in the weight file: where it begins, and how it lies in memory.

    Attributes:
        dtype: As torch names it.
        shape: Of the tensor.
        order: See `PlacedEntry`.
        offset: In bytes.
        grad: Whether the model's own may have a gradient, on which torch's choice of kernels depends.
    """

    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    offset: int
    grad: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsEntry(Entry):
    """The weight file of a bundle in one of torch's formats, and every weight in it."""

    file: str
    tensors: Mapping[str, WeightEntry]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceEntry(Entry):
    """A part of the weight file that is a tensor of the model's state dict.

    Attributes:
        offset: Where it begins, in bytes.
        keys: Its names in the state dict: several where weights are tied.
        dtype: As torch names it.
        shape: In the state dict.
        order: Of its dimensions in the weight file, from the slowest to the fastest.
        sha256: Of this part of the weight file.
    """

    offset: int
    keys: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeptEntry(Entry):
    """A part of the weight file that no tensor of the state dict is: where it begins, and how long it is."""

    offset: int
    bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightSourcesEntry(Entry):
    """What the weight file of a bundle that was exported without it is made of.

    Attributes:
        file: The weight file, whose size and hash are among the bundle's files.
        tensors: Its parts that are in the state dict.
        kept: Its other parts. They are in `constants`, one after the other.
        constants: The file that holds these; None if there are none.
    """

    file: str
    tensors: tuple[SourceEntry, ...]
    kept: tuple[KeptEntry, ...]
    constants: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorRTEntry(Entry):
    """What `tensorrt.prepare` found.

    Attributes:
        list: Version of the list of operators that it compared with.
        unlisted: A line for each operator that is not on it.
        sizes: Of dynamic sizes: smallest, usual, largest.
    """

    list: str
    unlisted: tuple[str, ...]
    sizes: Mapping[str, tuple[int, int, int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest(Entry):
    """Everything that is said of a bundle.

    Attributes:
        model: Name of the model's class.
        graph_format: "onnx", "pt2" or "aoti".
        opset: ONNX operator set; None for other formats.
        torch: The version that wrote the graphs.
        arguments: What the model's forward takes by position, in order.
        inputs: Tensors of a call, in the order of the graphs' inputs.
        constants: The rest of a call.
        values: Inputs of which only these values are right.
        outputs: What the model returns.
        symbols: Dynamic sizes.
        conditions: Arithmetic over the symbols that is not 0 where the graphs hold.
        slots: The cache state of one context.
        config: The settings that a session starts with.
        blocks: What a reused step skips.
        measured: The blocks that the indicator measures.
        notes: What the plan says beside.
        graphs: By kind: `compute`, `reuse` and `guarded`.
        self_check: What the exporter's check found.
        files: Every other file of the bundle.
        device: The one that the graphs were exported for. For torch's formats alone, as `weights`.
        weights: Where the weights are, if the graphs do not say so themselves.
        weight_sources: What the weight file is made of, if the bundle was exported without it.
        tensorrt: What was prepared for TensorRT.
    """

    model: str
    graph_format: str
    opset: int | None
    torch: str
    arguments: tuple[str, ...]
    inputs: tuple[InputEntry, ...]
    constants: tuple[ConstantEntry, ...]
    values: tuple[ValueEntry, ...]
    outputs: OutputsEntry
    symbols: tuple[SymbolEntry, ...]
    conditions: tuple[str, ...]
    slots: tuple[SlotEntry, ...]
    config: CacheConfig
    blocks: tuple[BlockEntry, ...]
    measured: tuple[str, ...]
    notes: tuple[str, ...]
    graphs: Mapping[str, GraphEntry]
    self_check: Mapping[str, Any]
    files: Mapping[str, FileEntry]
    device: str | None = None
    weights: WeightsEntry | None = None
    weight_sources: WeightSourcesEntry | None = None
    tensorrt: TensorRTEntry | None = None
