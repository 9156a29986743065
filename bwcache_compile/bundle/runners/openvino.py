"""A bundle's graphs in OpenVINO. Needs numpy and openvino, no torch and no onnxruntime."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bwcache_compile.bundle.call import PAIRS, graph_shape
from bwcache_compile.bundle.files import Bundle
from bwcache_compile.bundle.manifest import TensorEntry
from bwcache_compile.errors import BundleError, ConfigError, StateError, first_line
from bwcache_compile.graph_io import cache_in

_DTYPES = {"boolean": "bool", "f16": "float16", "f32": "float32", "f64": "float64", "i32": "int32", "i64": "int64", "u8": "uint8"}
_PRECISION = {"INFERENCE_PRECISION_HINT": "f32"}
"""On processors with bfloat16 instructions OpenVINO would compute in bfloat16 of its own accord."""


class OpenVINORunner:
    """OpenVINO: state in tensors on the host, written in place by the inference requests.

    Each graph has one request; calls on several threads wait for one another.
    """

    takes_buffers = True

    def __init__(
        self, bundle: Bundle, kinds: Sequence[str], *, device: str | None = None, options: Mapping[str, Any] | None = None
    ) -> None:
        """Compile the graphs of these kinds; see `load` for the other arguments."""
        import openvino

        self._manifest, self.device = bundle.manifest, device or "CPU"
        self._refuse_bfloat16()
        core = openvino.Core()
        self._graphs: dict[str, Any] = {}
        self._requests: dict[str, Any] = {}
        self._locks = {kind: threading.Lock() for kind in kinds}
        for kind in kinds:
            path = bundle.graph_file(kind)
            try:
                self._graphs[kind] = core.compile_model(str(path), self.device, {**_PRECISION, **(options or {})})
                self._requests[kind] = self._graphs[kind].create_infer_request()
            except Exception as error:  # openvino's errors are RuntimeErrors with the reason far below
                devices = ", ".join(core.available_devices)
                raise BundleError(f"OpenVINO cannot run {path} on {self.device} (devices: {devices}): {_reason(error)}") from error
            self._check(kind)

    def _refuse_bfloat16(self) -> None:
        """Refuse a bundle that passes bfloat16 in or out.

        Raises:
            ConfigError: It does.
        """
        entries = (*self._manifest.inputs, *self._manifest.outputs.items, *self._manifest.slots)
        half = [entry.name for entry in entries if entry.dtype == "bfloat16"]
        if half:
            raise ConfigError(
                f"{half[0]} has dtype bfloat16, which numpy does not support, and backend='openvino' passes numpy arrays. Export the model"
                " in float32 or float16."
            )

    def _check(self, kind: str) -> None:
        """Compare a graph with what the manifest says of it."""
        entry, graph = self._manifest.graphs[kind], self._graphs[kind]
        for what, ports, said in (("inputs", graph.inputs, entry.inputs), ("outputs", graph.outputs, entry.outputs)):
            missing = [name for name, port in zip(said, ports, strict=False) if name not in port.names]
            if missing or len(ports) != len(said):
                found = [port.any_name for port in ports]
                raise BundleError(f"{entry.file} has {what} {found}, but the manifest lists {list(said)}.")
        known: dict[str, TensorEntry] = {item.name: item for item in self._manifest.inputs}
        known |= {cache_in(slot.name): slot for slot in self._manifest.slots}
        for name, port in zip(entry.inputs, graph.inputs, strict=True):
            if name not in known:
                continue
            type_name, shape = port.element_type.get_type_name(), graph_shape(known[name])
            dtype = PAIRS.get(known[name].dtype, known[name].dtype)
            if _DTYPES.get(type_name) != dtype:
                raise BundleError(f"{entry.file} has dtype {type_name} for {name}, but the manifest lists {dtype}.")
            dimensions = [size.get_length() if size.is_static else None for size in port.partial_shape]
            fixed = [(a, b) for a, b in zip(dimensions, shape, strict=False) if a is not None and isinstance(b, int)]
            if len(dimensions) != len(shape) or any(a != b for a, b in fixed):
                raise BundleError(f"{entry.file} has shape {dimensions} for {name}, but the manifest lists {shape}.")

    def value(self, given: Any, name: str, dtype: str) -> Any:
        """Return an input as a contiguous array; what lies on the host is not copied if it is one."""
        try:
            if isinstance(given, (int, float, bool, list, tuple, np.generic)):
                given = np.asarray(given, dtype=dtype)
            if not isinstance(given, np.ndarray):
                given = np.from_dlpack(given.contiguous() if hasattr(given, "contiguous") else given)
            pairs = np.stack([given.real, given.imag], axis=-1) if np.iscomplexobj(given) else given
            return np.ascontiguousarray(pairs).reshape(pairs.shape)  # the former makes a vector of a number
        except Exception as error:  # numpy's, or those of whatever was passed
            raise StateError(f"cannot convert {name} to {dtype}: {first_line(error)}") from error

    def kind(self, value: Any) -> tuple[str, tuple[int, ...]]:
        """Return the dtype and the shape of an array."""
        return str(value.dtype), tuple(value.shape)

    def full(self, slot: str, shape: tuple[int, ...], dtype: str, fill: float) -> Any:
        """Return a new array."""
        try:
            return np.full(shape, fill, dtype=dtype)
        except Exception as error:  # no memory, or no such number
            raise BundleError(f"cannot allocate the cache slot {slot} ({dtype}, shape {shape}): {first_line(error)}") from error

    def vector(self, numbers: Sequence[Any], dtype: str) -> Any:
        """Return a new array."""
        return np.array(numbers, dtype=dtype)

    def bytes(self, value: Any) -> int:
        """Return the size of an array."""
        return int(value.nbytes)

    def host(self, value: Any) -> Any:
        """Copy an array."""
        return value.copy()

    def numbers(self, value: Any) -> Sequence[float]:
        """Return a short array as numbers."""
        numbers: list[float] = value.reshape(-1).tolist()
        return numbers

    def to_output(self, value: Any) -> Any:
        """Return an output as it is."""
        return value

    def run(self, graph: str, inputs: Mapping[str, Any], buffers: Mapping[str, Any]) -> dict[str, Any]:
        """Run a graph on the caller's memory; outputs without a buffer are copied out of the request.

        Raises:
            BundleError: OpenVINO failed.
        """
        import openvino

        entry, compiled, request = self._manifest.graphs[graph], self._graphs[graph], self._requests[graph]
        with self._locks[graph]:
            try:
                for name, port in zip(entry.inputs, compiled.inputs, strict=True):
                    request.set_tensor(port, openvino.Tensor(inputs[name], shared_memory=True))
                for name, port in zip(entry.outputs, compiled.outputs, strict=True):
                    if name in buffers:
                        request.set_tensor(port, openvino.Tensor(buffers[name], shared_memory=True))
                request.infer()
                made = {
                    name: request.get_tensor(port).data.copy()
                    for name, port in zip(entry.outputs, compiled.outputs, strict=True)
                    if name not in buffers
                }
            except Exception as error:  # openvino's errors are RuntimeErrors with the reason far below
                raise BundleError(f"OpenVINO failed to run {entry.file}: {_reason(error)}") from error
        return {**made, **buffers}


def _reason(error: Exception) -> str:
    """Return the last line of an error of OpenVINO's that says something; those above say where in its sources it was raised."""
    lines = [
        line.strip() for line in str(error).splitlines() if line.strip() and not line.lstrip().startswith(("Exception from", "Check "))
    ]
    return lines[-1] if lines else first_line(error)
