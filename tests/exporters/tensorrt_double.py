"""TensorRT's real Python API over stub libraries, and a double of it whose engines run in ONNX Runtime.

Every class, method and enum of the double is the real API's: what the API lacks, the double lacks; and each call must fit
the signature that the API documents. Nothing here shows that an engine can be built.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import inspect
import math
import re
import shutil
import subprocess
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime as ort
import pytest

from bwcache_compile.bundle.arithmetic import arithmetic
from bwcache_compile.bundle.call import _symbols
from bwcache_compile.bundle.manifest import Manifest, Size

_SYMBOLS = (
    "createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL createNvOnnxParserRefitter_INTERNAL"
    " createNvOnnxParser_INTERNAL getBuilderPluginRegistry getNvOnnxParserVersion getPluginRegistry initLibNvInferPlugins"
)
_LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")


def bindings(folder: Path) -> types.ModuleType:
    """Import TensorRT's Python extension over libraries that hold nothing but the symbols it asks for."""
    with contextlib.suppress(ImportError):
        importlib.import_module("tensorrt")  # a real one brings its libraries
        return importlib.import_module("tensorrt_bindings")
    if importlib.util.find_spec("tensorrt_bindings") is None:
        pytest.skip("needs tensorrt-cu13-bindings, which is in the extra [test] on Linux x86-64")
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc, for the stub libraries under TensorRT's bindings")
    source = folder / "stubs.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in _SYMBOLS.split()))
    for name in _LIBRARIES:
        file = folder / f"{name}.so.11"
        subprocess.run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{file.name}", str(source), "-o", str(file)], check=True)
        ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
    return importlib.import_module("tensorrt_bindings")


def signatures(method: Any) -> list[inspect.Signature]:
    """Return the signatures that a method of the extension documents, with `self`."""
    found = []
    for line in (method.__doc__ or "").splitlines():
        match = re.match(r"(?:\d+\. )?(\w+\(self.*\)) -> ", line.strip())
        if match:
            text = re.sub(r"<[^<>]*>", "None", match[1])
            scope: dict[str, Any] = {}
            exec(f"from __future__ import annotations\ndef {text}: ...", scope)
            found.append(inspect.signature(scope[text.partition("(")[0]]))
    return found


class Double:
    """Stands for the module `tensorrt`. Without the names in `removed`, such as "Builder.create_network"."""

    def __init__(self, real: types.ModuleType, manifest: Manifest, removed: str = "") -> None:
        self.real, self.manifest, self.removed = real, manifest, removed
        self.used: set[str] = set()
        self.mocks: list[tuple[str, mock.Mock]] = []

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.real, name)  # AttributeError where the API has no such thing
        made = getattr(type(self), f"_{name}", None)
        if made is not None:
            return lambda *args: made(self, *args)
        return _Members(self, name, value) if hasattr(value, "__members__") else value

    def of(self, name: str, **returns: Any) -> mock.Mock:
        """Return an instance of one of the API's classes; `returns` says what methods do, or what properties are."""
        real = getattr(self.real, name)
        kept = {attribute: getattr(real, attribute) for attribute in dir(real) if f"{name}.{attribute}" != self.removed}
        made = mock.create_autospec(type(name, (), kept), instance=True, spec_set=True)
        for attribute, does in returns.items():
            if f"{name}.{attribute}" == self.removed:
                continue
            if callable(does):
                getattr(made, attribute).side_effect = does
            else:
                setattr(made, attribute, does)
        self.mocks.append((name, made))
        return made

    def calls(self) -> Iterator[tuple[str, str, mock._Call]]:
        for name, made in self.mocks:
            for call in made.mock_calls:
                yield name, call[0], call

    def check(self) -> None:
        """Assert that every call fits a signature that the API documents."""
        for name, method, (_, args, kwargs) in self.calls():
            known = signatures(getattr(getattr(self.real, name), method))
            assert known, f"{name}.{method} documents no signature"
            assert any(_binds(signature, args, kwargs) for signature in known), f"{name}.{method}{args} {kwargs}: {known}"

    # -- what the builder library would do -----------------------------------------------------------------------

    def _Builder(self, logger: Any) -> mock.Mock:
        network = self.of("INetworkDefinition")
        timing = {"serialize": lambda: b"timings"}
        config = self.of(
            "IBuilderConfig",
            create_timing_cache=lambda data: self.of("ITimingCache", **timing),
            set_timing_cache=lambda cache, ignore: True,
            get_timing_cache=lambda: self.of("ITimingCache", **timing),
            add_optimization_profile=lambda profile: 0,
        )
        return self.of(
            "Builder",
            create_network=lambda flags: network,
            create_builder_config=lambda: config,
            create_optimization_profile=lambda: self.of("IOptimizationProfile"),
            build_serialized_network=lambda network, config: network.name.encode(),
        )

    def _OnnxParser(self, network: Any, logger: Any) -> mock.Mock:
        def parse(path: str) -> bool:
            network.name = path  # the "engine" is the path of its graph
            return True

        return self.of("OnnxParser", parse_from_file=parse)

    def _Runtime(self, logger: Any) -> mock.Mock:
        return self.of("Runtime", deserialize_cuda_engine=lambda plan: self._engine(Path(plan.decode())))

    def _Refitter(self, engine: Any, logger: Any) -> mock.Mock:
        return self.of("Refitter", refit_cuda_engine=lambda: True)

    def _OnnxParserRefitter(self, refitter: Any, logger: Any) -> mock.Mock:
        return self.of("OnnxParserRefitter", refit_from_file=lambda path: True)

    def _engine(self, path: Path) -> mock.Mock:
        session = ort.InferenceSession(str(path))
        inputs, outputs = {v.name: v for v in session.get_inputs()}, {v.name: v for v in session.get_outputs()}
        names = [*inputs, *outputs]
        types = {"tensor(float)": self.real.DataType.FLOAT, "tensor(int64)": self.real.DataType.INT64}
        mode = self.real.TensorIOMode
        return self.of(
            "ICudaEngine",
            num_io_tensors=len(names),
            get_tensor_name=lambda i: names[i],
            get_tensor_mode=lambda name: mode.INPUT if name in inputs else mode.OUTPUT,
            get_tensor_dtype=lambda name: types[{**inputs, **outputs}[name].type],
            create_execution_context=lambda: self._context(session),
        )

    def _context(self, session: Any) -> mock.Mock:
        shapes: dict[str, tuple[int, ...]] = {}
        places: dict[str, int] = {}

        def array(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
            held = (ctypes.c_byte * (math.prod(shape) * np.dtype(dtype).itemsize)).from_address(places[name])
            return np.ctypeslib.as_array(held).view(dtype).reshape(shape)

        def output_shape(name: str) -> tuple[int, ...]:
            known: dict[str, Sequence[Size]] = {item.name: item.shape for item in self.manifest.outputs.items}
            symbols = _symbols(self.manifest, shapes)
            return tuple(arithmetic(size, symbols) for size in known.get(name, [len(self.manifest.measured) if name == "indicator" else 1]))

        def execute(stream: int) -> bool:
            dtypes = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
            feeds = {v.name: array(v.name, shapes[v.name], dtypes[v.type]).copy() for v in session.get_inputs()}
            for value, result in zip(session.get_outputs(), session.run(None, feeds), strict=True):
                array(value.name, result.shape, result.dtype)[...] = result
            return True

        return self.of(
            "IExecutionContext",
            active_optimization_profile=0,
            set_input_shape=lambda name, shape: shapes.update({name: shape}) is None,
            set_tensor_address=lambda name, memory: places.update({name: memory}) is None,
            get_tensor_shape=output_shape,
            execute_async_v3=execute,
        )


def _binds(signature: inspect.Signature, args: Any, kwargs: Any) -> bool:
    try:
        signature.bind(None, *args, **kwargs)
    except TypeError:
        return False
    return True


class _Members:
    """An enum of the API, which takes down what is asked of it."""

    def __init__(self, owner: Double, name: str, enum: Any) -> None:
        self._owner, self._name, self._enum = owner, name, enum

    def __getattr__(self, member: str) -> Any:
        name = f"{self._name}.{member}"
        if name == self._owner.removed:
            raise AttributeError(name)
        self._owner.used.add(name)
        return getattr(self._enum, member)
