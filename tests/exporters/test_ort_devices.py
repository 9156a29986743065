"""Where ONNX Runtime's state lies, by the providers that are asked for; no GPU is needed."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

import bwcache_compile as bw
from tests.exporters.helpers import Exported

CUDA, TENSORRT, CPU = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"


class Value:
    """Stands for `onnxruntime.OrtValue`, lies on the host, and takes down where it was to lie."""

    places: list[tuple[str, int]]
    made: dict[int, Any]

    @classmethod
    def ortvalue_from_numpy(cls, array: Any, device: str = "cpu", number: int = 0) -> Any:
        value = ort.OrtValue.ortvalue_from_numpy(array)
        if array.ndim > 1:
            cls.places.append((device, number))
        if device != "cpu":
            cls.made[id(value)] = value
        return value

    @classmethod
    def ortvalue_from_shape_and_type(cls, shape: Any, kind: int, device: str = "cpu", number: int = 0) -> Any:
        cls.places.append((device, number))
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, kind)


class Binding:
    """Stands for `onnxruntime.IOBinding`, and takes down what is bound: values, or where a new one is to lie."""

    def __init__(self, real: Any, bound: list[tuple[str, Any]]) -> None:
        self.real, self._bound = real, bound
        self.synchronize_inputs, self.get_outputs = real.synchronize_inputs, real.get_outputs

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self._bound.append((name, value))
        self.real.bind_ortvalue_input(name, value)

    def bind_ortvalue_output(self, name: str, value: Any) -> None:
        self._bound.append((name, value))
        self.real.bind_ortvalue_output(name, value)

    def bind_output(self, name: str, device: str, number: int) -> None:
        self._bound.append((name, (device, number)))
        self.real.bind_output(name)


class Session:
    """Stands for `onnxruntime.InferenceSession`: it runs on the CPU, and says that it runs on what it was asked for."""

    broken = False
    bound: list[tuple[str, Any]]

    def __init__(self, path: str, options: Any, providers: list[Any]) -> None:
        self._real = ort.InferenceSession(path, options, providers=[CPU])
        names = [provider if isinstance(provider, str) else provider[0] for provider in providers]
        self._providers = [CPU] if self.broken else names

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def get_providers(self) -> list[str]:
        return self._providers

    def io_binding(self) -> Binding:
        return Binding(self._real.io_binding(), self.bound)

    def run_with_iobinding(self, binding: Binding) -> None:
        self._real.run_with_iobinding(binding.real)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let onnxruntime seem to have a GPU's providers, and return its double."""
    value = type("Recording", (Value,), {"places": [], "made": {}})
    session = type("Recording", (Session,), {"bound": []})
    double = types.SimpleNamespace(OrtValue=value, InferenceSession=session, get_available_providers=lambda: [TENSORRT, CUDA, CPU])
    monkeypatch.setitem(sys.modules, "onnxruntime", double)  # type: ignore[arg-type]
    return double


@pytest.mark.parametrize(("providers", "place"), [
    ([CPU], ("cpu", 0)),
    ([CUDA, CPU], ("cuda", 0)),
    ([TENSORRT, CUDA, CPU], ("cuda", 0)),
    ([(TENSORRT, {"device_id": "1"}), (CUDA, {"device_id": "1"}), CPU], ("cuda", 1)),
    ([CPU, (CUDA, {"device_id": 2})], ("cuda", 2)),
])  # fmt: skip
def test_the_state_lies_where_a_provider_computes(deployed: Exported, gpu: Any, providers: list[Any], place: tuple[str, int]) -> None:
    runner: Any = bw.load(deployed.folder, providers=providers)._runner
    for dtype in ("float32", "int64", "bfloat16"):
        value = runner.full("output_0", (2, 3), dtype, 0.0)
        assert runner.kind(value) == (dtype, (2, 3))
    assert set(gpu.OrtValue.places) == {place}
    assert len(gpu.OrtValue.places) == 3
    assert np.array_equal(runner.full("trigger", (1,), "int64", -1.0).numpy(), [-1])


@pytest.mark.parametrize("outputs", ["ortvalue", "numpy"])
@pytest.mark.parametrize("guarded", [False, True])
def test_the_state_never_leaves_the_device(
    deployed: Exported, gpu: Any, monkeypatch: pytest.MonkeyPatch, outputs: str, guarded: bool
) -> None:
    """Over steps of both kinds: the graphs read and write the state where it lies, and eight bytes are copied to the host at most."""
    session = bw.load(deployed.folder, providers=[TENSORRT, CUDA, CPU], outputs=outputs, guarded=guarded)
    copied: list[tuple[str, tuple[int, ...]]] = []
    real = ort.OrtValue.numpy

    def numpy(value: Any) -> Any:
        if id(value) in gpu.OrtValue.made:
            copied.append((value.data_type(), tuple(value.shape())))
        return real(value)

    monkeypatch.setattr(ort.OrtValue, "numpy", numpy)
    for step in range(8):
        x, t = np.full((2, 6, 4), 1 + step / 8, dtype=np.float32), np.full((2,), 1 - step / 8, dtype=np.float32)
        with session.cache_context("cond", step_index=step):
            session(x, t)
    bound = gpu.InferenceSession.bound
    state = [value for name, value in bound if name.startswith("cache_")]
    assert len(state) >= 8
    assert all(id(value) in gpu.OrtValue.made for value in state)
    placed = {name: place for name, place in bound if isinstance(place, tuple)}
    assert {placed.pop(item.name) for item in deployed.manifest.outputs.items} == {("cuda" if outputs == "ortvalue" else "cpu", 0)}
    assert set(placed.values()) <= {("cpu", 0)}  # how many steps reuse, and the indicator
    assert set(copied) <= ({("tensor(int64)", (1,))} if guarded else set())
    assert {record.computed for record in session.report().contexts["cond"].steps} == {True, False}


def test_a_provider_that_does_not_start_is_refused(deployed: Exported, gpu: Any) -> None:
    """onnxruntime logs that a library is missing, and would run the graphs on the CPU."""
    gpu.InferenceSession.broken = True
    with pytest.raises(
        bw.ConfigError, match=r"CUDAExecutionProvider could not start, and onnxruntime would run .* on CPUExecutionProvider"
    ):
        bw.load(deployed.folder, device="cuda")
