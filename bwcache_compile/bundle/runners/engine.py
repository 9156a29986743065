"""A bundle's graphs as TensorRT engines, over torch's tensors. Needs torch and TensorRT's runtime."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bwcache_compile.bundle.call import PAIRS
from bwcache_compile.bundle.files import Bundle
from bwcache_compile.bundle.runners.torch_graphs import TorchTensors
from bwcache_compile.bundle.settings import policy_inputs
from bwcache_compile.errors import BundleError, StateError
from bwcache_compile.graph_io import INDICATOR, cache_in, cache_out

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}


class TensorRTRunner(TorchTensors):
    """TensorRT: state in contiguous tensors on the device, written in place by the engines.

    Each CUDA stream that runs an engine has an execution context of its own, with its own activation memory: TensorRT runs
    what is enqueued with one context one after another, and two streams at once would overwrite each other's activations.

    `run` waits for nothing: with buffers for every output, and `step` and the policy's parameters on the device, it can be
    captured in a CUDA graph (`torch.cuda.graph`), one for each pair of buffers that take turns. A stream that has run nothing
    before it is captured takes the execution context that ran first, since none can be made while capturing: do not replay
    such a graph beside other work on the same engine.
    """

    takes_buffers = True

    def __init__(
        self, trt: Any, bundle: Bundle, folder: Path, record: Mapping[str, Any], kinds: Sequence[str], *, allow_code: bool, device: str
    ) -> None:
        """Open the engines of these kinds; see `tensorrt.load`."""
        self._manifest, self._device = bundle.manifest, torch.device(device)
        self._profiles = {kind: record["engines"][kind]["profiles"] for kind in kinds}
        logger = trt.Logger(trt.Logger.WARNING)
        runtime = trt.Runtime(logger)
        if record["version_compatible"]:
            if not allow_code:
                raise BundleError(
                    f"{folder} contains version-compatible engines, which carry code. Pass allow_code=True if you trust their author."
                )
            runtime.engine_host_code_allowed = True
        self._alive = [logger, runtime]  # engines refer to both
        self._engines: dict[str, Any] = {}
        self._contexts: dict[str, dict[int, Any]] = {kind: {} for kind in kinds}
        self._locks = {kind: threading.Lock() for kind in kinds}
        self._reads: dict[str, list[str]] = {}
        for kind in kinds:
            with self._current():
                self._engines[kind] = self._opened(trt, bundle, folder, kind, record["stripped"])

    def _stream(self) -> int:
        """Return the handle of torch's current stream on the device."""
        return torch.cuda.current_stream(self._device).cuda_stream if self._device.type == "cuda" else 0

    def _current(self) -> Any:
        """Make the device current: an engine belongs to the one that is when it is opened, and runs where it was."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext()

    def _opened(self, trt: Any, bundle: Bundle, folder: Path, kind: str, stripped: bool) -> Any:
        logger, runtime = self._alive
        engine = runtime.deserialize_cuda_engine((folder / f"{kind}.engine").read_bytes())
        if engine is None:
            raise BundleError(f"TensorRT {trt.__version__} cannot open {folder / f'{kind}.engine'}. Build it again with this version.")
        if stripped:
            refitter = trt.Refitter(engine, logger)
            parser = trt.OnnxParserRefitter(refitter, logger)
            if not parser.refit_from_file(str(bundle.graph_file(kind))) or not refitter.refit_cuda_engine():
                raise BundleError(f"{bundle.graph_file(kind)} does not contain the weights that {kind}.engine needs.")
        self._reads[kind] = self._check(trt, kind, engine)
        return engine

    def _check(self, trt: Any, kind: str, engine: Any) -> list[str]:
        """Compare an engine with what the manifest says of its graph; returns the inputs that it has.

        Raises:
            BundleError: It has other tensors, or reads them as other dtypes.
        """
        entry = self._manifest.graphs[kind]
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        outputs = [name for name in names if name not in inputs]
        if not set(inputs) <= set(entry.inputs) or set(outputs) != set(entry.outputs):
            raise BundleError(f"{kind}.engine has inputs {inputs} and outputs {outputs}, which differ from the manifest.")
        for name in names:
            found = engine.get_tensor_dtype(name).name
            if _DTYPES.get(found, found.lower()) != self._dtype(name):
                raise BundleError(f"{kind}.engine has dtype {found} for {name}, but the manifest lists {self._dtype(name)}.")
        return inputs

    def _dtype(self, name: str) -> str:
        manifest = self._manifest
        known = {e.name: PAIRS.get(e.dtype, e.dtype) for e in (*manifest.inputs, *manifest.outputs.items)}
        known |= {way(slot.name): slot.dtype for slot in manifest.slots for way in (cache_in, cache_out)}
        known |= {entry.name: entry.dtype for entry in policy_inputs(manifest.config)}
        return known.get(name, "float32" if name == INDICATOR else "int64")

    def value(self, given: Any, name: str, dtype: str) -> Any:
        """Return an input as a contiguous tensor on the device, where it is not copied if it is one."""
        tensor = super().value(given, name, dtype)
        return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).contiguous()

    def _context(self, kind: str, stream: int) -> Any:
        """Return a stream's execution context, made when it first runs the engine."""
        contexts = self._contexts[kind]
        capturing = self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if stream not in contexts and contexts and capturing:
            return next(iter(contexts.values()))
        if stream not in contexts:
            contexts[stream] = self._engines[kind].create_execution_context()
        return contexts[stream]

    def _choose(self, context: Any, kind: str, inputs: Mapping[str, Any], stream: int) -> None:
        """Select the first optimisation profile that these shapes fit.

        Raises:
            StateError: None does.
        """

        def fits(profile: Mapping[str, Any]) -> bool:
            ends = ((inputs[name].shape, low, high) for name, (low, _, high) in profile.items())
            return all(a <= size <= b for shape, low, high in ends for size, a, b in zip(shape, low, high, strict=True))

        chosen = next((i for i, profile in enumerate(self._profiles[kind]) if fits(profile)), None)
        if chosen is None:
            users = [name for name in self._profiles[kind][0] if not name.startswith(cache_in(""))]
            found = ", ".join(f"{name} {list(inputs[name].shape)}" for name in users)
            taken = "; or ".join(", ".join(f"{name} {p[name][0]} to {p[name][2]}" for name in users) for p in self._profiles[kind])
            raise StateError(f"{kind}.engine was built for {taken}, got {found}. Build it with another optimization profile.")
        if context.active_optimization_profile != chosen:
            context.set_optimization_profile_async(chosen, stream)

    def run(self, graph: str, inputs: Mapping[str, Any], buffers: Mapping[str, Any]) -> dict[str, Any]:
        """Enqueue an engine on torch's current stream. Its outputs go to `buffers`, or to new tensors where there is none.

        Raises:
            StateError: The engine was not built for these sizes.
            BundleError: TensorRT failed.
        """
        stream, returned = self._stream(), {}
        with self._locks[graph], self._current():
            context = self._context(graph, stream)
            self._choose(context, graph, inputs, stream)
            for name in self._reads[graph]:
                if not context.set_input_shape(name, tuple(inputs[name].shape)):
                    raise BundleError(f"{graph}.engine does not accept {name} with shape {list(inputs[name].shape)}.")
                context.set_tensor_address(name, inputs[name].data_ptr())
            for name in self._manifest.graphs[graph].outputs:
                value = buffers.get(name)
                if value is None:
                    shape = tuple(context.get_tensor_shape(name))
                    value = torch.empty(shape, dtype=getattr(torch, self._dtype(name)), device=self._device)
                context.set_tensor_address(name, value.data_ptr())
                returned[name] = value
            if not context.execute_async_v3(stream):
                raise BundleError(f"TensorRT failed to run {graph}.engine; see its log.")
        return returned
