"""A bundle's graphs in ONNX Runtime. Needs numpy and onnxruntime, no torch."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bwcache_compile.bundle.call import PAIRS, graph_shape
from bwcache_compile.bundle.files import Bundle
from bwcache_compile.bundle.manifest import TensorEntry
from bwcache_compile.errors import BundleError, ConfigError, StateError, first_line
from bwcache_compile.graph_io import INDICATOR, REUSE_LEFT, cache_in

_ON_HOST = (REUSE_LEFT, INDICATOR)
_ON_CUDA = ("CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")
_BFLOAT16 = 16
"""Its number in onnx.TensorProto."""
_NAMES = {"float": "float32", "double": "float64"}


def _dtype(onnx_type: str) -> str:
    name = onnx_type.removeprefix("tensor(").removesuffix(")")
    return _NAMES.get(name, name)


def _device(providers: Sequence[Any], available: Sequence[str]) -> tuple[str, int]:
    """Return where the state lies: on the CUDA device of the first provider that has one, wherever it stands in the list."""
    for provider in providers:
        name, settings = (provider, {}) if isinstance(provider, str) else provider
        if name in _ON_CUDA and name in available:
            return "cuda", int(settings.get("device_id", 0))
    return "cpu", 0


def _pairs(given: Any) -> Any:
    return np.stack([given.real, given.imag], axis=-1) if np.iscomplexobj(given) else given


class OrtRunner:
    """ONNX Runtime: state in `OrtValue`s on the sessions' device, written in place by IOBinding."""

    takes_buffers = True

    def __init__(
        self, bundle: Bundle, kinds: Sequence[str], *, outputs: str, providers: Sequence[Any] | None = None, options: Any = None
    ) -> None:
        """Open the graphs of these kinds; see `load` for the other arguments."""
        import onnxruntime as ort

        if outputs not in ("numpy", "ortvalue"):
            raise ConfigError(f'outputs must be "numpy" or "ortvalue", got {outputs!r}.')
        self._manifest, self._outputs = bundle.manifest, outputs
        providers = list(providers or ["CPUExecutionProvider"])
        first = providers[0] if isinstance(providers[0], str) else providers[0][0]
        if first not in ort.get_available_providers():
            raise ConfigError(
                f"{first} is not available in this onnxruntime, which has {', '.join(ort.get_available_providers())}. Install a build of"
                " onnxruntime that has it (onnxruntime-gpu for CUDA), or choose another device."
            )
        self._device = _device(providers, ort.get_available_providers())
        self.device = self._device[0] if self._device[0] == "cpu" else f"cuda:{self._device[1]}"
        self._sessions = {}
        for kind in kinds:
            path = bundle.graph_file(kind)
            try:
                self._sessions[kind] = ort.InferenceSession(str(path), options, providers=providers)
            except Exception as error:  # onnxruntime's errors have no common class of their own
                raise BundleError(f"{first} cannot run {path}: {first_line(error)}{self._advice(first)}") from error
            if first not in (started := self._sessions[kind].get_providers()):  # onnxruntime logs that and goes on without it
                raise ConfigError(
                    f"{first} could not start, and onnxruntime would run {path} on {', '.join(started)}. Its log says why: a library"
                    " of CUDA, cuDNN or TensorRT of another version than it was built for, or no driver. Install what it needs, or choose"
                    " another device."
                )
            self._check(kind)
        half = [item.name for item in self._manifest.outputs.items if item.dtype == "bfloat16"]
        if half and outputs == "numpy":
            raise ConfigError(
                f'{half[0]} has dtype bfloat16, which numpy does not support; pass outputs="ortvalue", which supports DLPack.'
            )

    def _advice(self, provider: str) -> str:
        dtypes = [entry.dtype for entry in (*self._manifest.inputs, *self._manifest.slots)]
        if "bfloat16" not in f"{dtypes} {self._manifest.self_check}" or provider != "CPUExecutionProvider":
            return ""
        advice = "Use a GPU, or export the model in float32 or float16."
        return f"\n  The bundle computes in bfloat16, and this provider lacks kernels for it. {advice}"

    def _check(self, kind: str) -> None:
        """Compare a graph with what the manifest says of it."""
        entry, session = self._manifest.graphs[kind], self._sessions[kind]
        for what, values, said in (("inputs", session.get_inputs(), entry.inputs), ("outputs", session.get_outputs(), entry.outputs)):
            found = [value.name for value in values]
            if found != list(said):
                raise BundleError(f"{entry.file} has {what} {found}, but the manifest lists {list(said)}.")
        known: dict[str, TensorEntry] = {entry.name: entry for entry in self._manifest.inputs}
        known |= {cache_in(slot.name): slot for slot in self._manifest.slots}
        for value in session.get_inputs():
            if value.name not in known:
                continue
            dtype, shape = known[value.name].dtype, graph_shape(known[value.name])
            if _dtype(value.type) != PAIRS.get(dtype, dtype):
                raise BundleError(f"{entry.file} has dtype {_dtype(value.type)} for {value.name}, but the manifest lists {dtype}.")
            fixed = [(a, b) for a, b in zip(value.shape, shape, strict=False) if isinstance(a, int) or isinstance(b, int)]
            if len(value.shape) != len(shape) or any(a != b for a, b in fixed):
                raise BundleError(f"{entry.file} has shape {value.shape} for {value.name}, but the manifest lists {shape}.")

    def value(self, given: Any, name: str, dtype: str) -> Any:
        """Return an input as an OrtValue; arrays that lie on the same device are not copied."""
        import onnxruntime as ort

        if isinstance(given, ort.OrtValue):
            return given
        try:
            if isinstance(given, (int, float, bool, list, tuple, np.generic)):
                given = np.asarray(given, dtype=dtype)
            if (dtype in PAIRS or dtype == "bool") and not isinstance(given, np.ndarray):
                given = np.from_dlpack(given)  # onnxruntime takes neither kind by DLPack
            if isinstance(given, np.ndarray):
                return ort.OrtValue.ortvalue_from_numpy(_pairs(given) if dtype in PAIRS else np.asarray(given, order="C"))
            if hasattr(given, "__dlpack__"):
                return ort.OrtValue.from_dlpack(given.contiguous() if hasattr(given, "contiguous") else given)
        except Exception as error:  # numpy's, onnxruntime's, or those of whatever was passed
            raise StateError(f"cannot convert {name} to {dtype}: {first_line(error)}") from error
        raise StateError(f"{name} has unsupported type {type(given).__name__}; pass a numpy array, an OrtValue or an object with DLPack.")

    def kind(self, value: Any) -> tuple[str, tuple[int, ...]]:
        """Return the dtype and the shape of an OrtValue."""
        return _dtype(str(value.data_type())), tuple(value.shape())

    def full(self, slot: str, shape: tuple[int, ...], dtype: str, fill: float) -> Any:
        """Return a new OrtValue on the sessions' device."""
        import onnxruntime as ort

        try:
            if dtype == "bfloat16":  # numpy has none; what is kept in it starts as zeros
                value = ort.OrtValue.ortvalue_from_shape_and_type(shape, _BFLOAT16, *self._device)
                value.update_inplace(np.zeros(shape, dtype=np.uint16))
                return value
            return ort.OrtValue.ortvalue_from_numpy(np.full(shape, fill, dtype=dtype), *self._device)
        except Exception as error:  # numpy's or onnxruntime's: no memory, or no such number
            raise BundleError(f"cannot allocate the cache slot {slot} ({dtype}, shape {shape}): {first_line(error)}") from error

    def vector(self, numbers: Sequence[Any], dtype: str) -> Any:
        """Return a new OrtValue on the host: onnxruntime copies what a graph reads elsewhere."""
        import onnxruntime as ort

        return ort.OrtValue.ortvalue_from_numpy(np.array(numbers, dtype=dtype))

    def bytes(self, value: Any) -> int:
        """Return the size of an OrtValue."""
        return int(value.tensor_size_in_bytes())

    def host(self, value: Any) -> Any:
        """Copy an OrtValue to a numpy array.

        Raises:
            StateError: It is bfloat16.
        """
        if self.kind(value)[0] == "bfloat16":
            raise StateError(
                "a cache slot of this bundle has dtype bfloat16, which numpy does not support, so its state cannot be copied to the host."
            )
        return value.numpy()

    def numbers(self, value: Any) -> Sequence[float]:
        """Copy a short OrtValue to the host.

        Raises:
            StateError: It is bfloat16 and lies on a device.
        """
        if self.kind(value)[0] != "bfloat16":
            array = value.numpy()
        elif value.device_name() == "cpu":  # numpy has no bfloat16: the upper half of a float32
            size = value.tensor_size_in_bytes()
            upper = np.frombuffer((ctypes.c_char * size).from_address(value.data_ptr()), dtype=np.uint16)
            array = (upper.astype(np.uint32) << 16).view(np.float32)
        else:
            raise StateError(
                "the timestep is a bfloat16 value on a device, which numpy cannot read, so a restarted run would go unnoticed."
                " Pass it on the host, or give the step index: `with session.cache_context(name, step_index=...):`."
            )
        numbers: list[float] = array.reshape(-1).tolist()
        return numbers

    def to_output(self, value: Any) -> Any:
        """Return an output as a numpy array, or as it is with `outputs="ortvalue"`."""
        return value if self._outputs == "ortvalue" else value.numpy()

    def run(self, graph: str, inputs: Mapping[str, Any], buffers: Mapping[str, Any]) -> dict[str, Any]:
        """Run a graph with every input and output bound; none is copied that lies on the device.

        Raises:
            BundleError: onnxruntime failed.
        """
        names, session = self._manifest.graphs[graph], self._sessions[graph]
        try:
            binding = session.io_binding()
            for name in names.inputs:
                binding.bind_ortvalue_input(name, inputs[name])
            for name in names.outputs:
                if name in buffers:
                    binding.bind_ortvalue_output(name, buffers[name])
                else:
                    on_device = self._outputs == "ortvalue" and name not in _ON_HOST
                    binding.bind_output(name, *(self._device if on_device else ("cpu", 0)))
            binding.synchronize_inputs()  # another library may still be writing them, on a stream of its own
            session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's errors have no common class of their own
            raise BundleError(f"ONNX Runtime failed to run {names.file}: {first_line(error)}") from error
        # a buffer's own OrtValue keeps its memory alive; the one that the binding returns does not
        return {**dict(zip(names.outputs, binding.get_outputs(), strict=True)), **buffers}
