"""A bundle's graphs in torch: exported programs run operator by operator, or packages that AOTInductor compiled."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export.passes import move_to_device_pass

from bwcache_compile.bundle.call import PAIRS
from bwcache_compile.bundle.files import Bundle
from bwcache_compile.bundle.manifest import PlacedEntry
from bwcache_compile.bundle.runners.sequence import Graph, PackageSequence
from bwcache_compile.bundle.runners.weights import read_weights
from bwcache_compile.errors import BundleError, ConfigError, StateError, first_line
from bwcache_compile.ir.layout import in_order
from bwcache_compile.ir.torch_compat import load_package


def _exported(path: Path, device: torch.device, exported_on: str) -> tuple[Graph, int]:
    program = torch.export.load(path)
    if device != torch.device(exported_on):
        program = move_to_device_pass(program, {exported_on: str(device)})
    return program.graph_module, len(program.graph.find_nodes(op="placeholder"))


class TorchTensors:
    """What every runner over torch's tensors does alike."""

    _device: torch.device

    @property
    def device(self) -> str:
        """Where tensors lie."""
        return str(self._device)

    def value(self, given: Any, name: str, dtype: str) -> Any:
        """Return an input as a tensor on the device; it is not copied if it is one. Raises StateError for what is no tensor."""
        try:
            if isinstance(given, (int, float, bool, list, tuple)):
                given = torch.tensor(given, dtype=getattr(torch, dtype))
            elif not isinstance(given, Tensor) and hasattr(given, "__array__"):
                given = torch.tensor(given)
            elif not isinstance(given, Tensor) and hasattr(given, "__dlpack__"):
                given = torch.from_dlpack(given)
        except Exception as error:  # torch's, or those of whatever was passed
            raise StateError(f"cannot convert {name} to {dtype}: {first_line(error)}") from error
        if not isinstance(given, Tensor):
            raise StateError(f"{name} has unsupported type {type(given).__name__}; pass a tensor, a numpy array or an object with DLPack.")
        return given.detach().to(self._device)

    def kind(self, value: Any) -> tuple[str, tuple[int, ...]]:
        """Return the dtype and the shape of a tensor."""
        return str(value.dtype).removeprefix("torch."), tuple(value.shape)

    def full(self, slot: str, shape: tuple[int, ...], dtype: str, fill: float) -> Any:
        """Return a new tensor on the device."""
        try:
            return torch.full(shape, fill, dtype=getattr(torch, dtype), device=self._device)
        except (RuntimeError, TypeError) as error:  # no memory, or no such shape
            raise BundleError(f"cannot allocate the cache slot {slot} ({dtype}, shape {shape}): {first_line(error)}") from error

    def vector(self, numbers: Sequence[Any], dtype: str) -> Any:
        """Return a new tensor on the device; a single number is filled in there, so that nobody waits for a copy."""
        settings: Any = {"dtype": getattr(torch, dtype), "device": self._device}
        if len(numbers) == 1 and isinstance(numbers[0], (int, float)):
            return torch.full((1,), numbers[0], **settings)
        return torch.tensor(numbers, **settings)

    def bytes(self, value: Any) -> int:
        """Return the size of a tensor."""
        return int(value.nbytes)

    def host(self, value: Any) -> Any:
        """Copy a tensor to the host."""
        return value.cpu()

    def numbers(self, value: Any) -> Sequence[float]:
        """Copy a short tensor to the host."""
        numbers: list[float] = value.reshape(-1).tolist()
        return numbers

    def to_output(self, value: Any) -> Any:
        """Return an output as it is."""
        return value


class TorchRunner(TorchTensors):
    """torch: state in tensors on the device that the graphs were exported for. Both graphs read one copy of the weights."""

    takes_buffers = False

    def __init__(self, bundle: Bundle, device: str | None = None) -> None:
        """Open both graphs. This unpickles what they contain, or runs their machine code: the caller has asked for it."""
        self._manifest = manifest = bundle.manifest
        assert manifest.device is not None
        assert manifest.weights is not None
        taken: list[PlacedEntry] = [*manifest.inputs, *manifest.slots]
        self._orders = {entry.name: entry.order or () for entry in taken}
        if device is not None and manifest.graph_format == "aoti" and torch.device(device) != torch.device(manifest.device):
            raise ConfigError(
                f'a bundle of format "aoti" is compiled for {manifest.device} and cannot run on {device}. Export it on that device.'
            )
        try:
            self._device = torch.device(device or manifest.device)
            torch.zeros(1, device=self._device).cpu()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            if device is not None:
                raise ConfigError(f"device {device!r} is not available: {first_line(error)}") from error
            raise BundleError(
                f"{bundle.folder} was exported for device {manifest.device}, which is not available: {first_line(error)}"
            ) from error
        described, plain = manifest.weights.tensors, manifest.graph_format == "pt2"
        mapped = read_weights(bundle.folder / manifest.weights.file, described)
        weights = {name: tensor.to(self._device).detach() for name, tensor in mapped.items()}  # no views: see the next line
        for name, tensor in weights.items():  # torch chooses kernels by whether weights are views, and whether they may have gradients
            tensor.requires_grad_(plain and tensor.is_floating_point() and described[name].grad)
        opened: dict[str, tuple[Graph, int]] = {}

        def open_call(file: str, read: Sequence[str], inputs: int) -> tuple[Graph, list[Tensor]]:
            path, expected = bundle.folder / file, len(read) + inputs
            missing = [name for name in read if name not in weights]
            if missing:
                raise BundleError(f"{path} reads the weight {missing[0]}, which is not in the bundle.")
            if file not in opened:
                opened[file] = self._opened(path)
            graph, found = opened[file]
            if found != expected:
                raise BundleError(f"{path} has {found} inputs, but the manifest lists {expected}.")
            return graph, [weights[name] for name in read]

        self._graphs: dict[str, tuple[Graph, list[Tensor]]] = {}
        for kind, entry in manifest.graphs.items():
            if entry.sequence is not None:
                calls = [open_call(call.file, call.weights, len(call.inputs)) for call in entry.sequence.calls]
                self._graphs[kind] = PackageSequence(entry.inputs, entry.sequence, calls), []
            else:
                assert entry.file is not None
                self._graphs[kind] = open_call(entry.file, entry.weights or (), len(entry.inputs))

    def _opened(self, path: Path) -> tuple[Graph, int]:
        """Open a program or a package; return it and how many inputs it takes."""
        manifest = self._manifest
        assert manifest.device is not None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return load_package(path) if manifest.graph_format == "aoti" else _exported(path, self._device, manifest.device)
        except Exception as error:  # what it unpickles or runs may raise anything
            versions = f"written with torch {manifest.torch}, this is {torch.__version__}"
            raise BundleError(f"torch cannot open {path} ({versions}): {type(error).__name__}: {first_line(error)}") from error

    def value(self, given: Any, name: str, dtype: str) -> Any:
        """Return an input as a tensor on the device, lying as the graphs were captured; it is not copied if it does."""
        tensor, order = super().value(given, name, dtype), self._orders[name]
        if PAIRS.get(dtype) == self.kind(tensor)[0] and tensor.shape[-1:] == (2,):
            tensor = torch.view_as_complex(tensor.contiguous())
        return in_order(tensor, order) if tensor.dim() == len(order) else tensor

    def full(self, slot: str, shape: tuple[int, ...], dtype: str, fill: float) -> Any:
        """Return a new tensor on the device, lying as the graphs return it."""
        return in_order(super().full(slot, shape, dtype, fill), self._orders[slot])

    def run(self, graph: str, inputs: Mapping[str, Any], buffers: Mapping[str, Any]) -> dict[str, Any]:
        """Run a graph; what is cast is written in it, so an autocast around the call changes nothing.

        Raises:
            BundleError: torch failed.
        """
        entry = self._manifest.graphs[graph]
        run, weights = self._graphs[graph]
        try:
            with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
                returned = run(*weights, *(inputs[name] for name in entry.inputs))
            return dict(zip(entry.outputs, returned, strict=True))
        except BundleError:  # of a sequence, which names the package
            raise
        except Exception as error:  # operators raise what they like
            raise BundleError(f"torch failed to run {entry.file}: {type(error).__name__}: {first_line(error)}") from error
