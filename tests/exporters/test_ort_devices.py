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

    @classmethod
    def ortvalue_from_numpy(cls, array: Any, device: str = "cpu", number: int = 0) -> Any:
        if array.ndim > 1:
            cls.places.append((device, number))
        return ort.OrtValue.ortvalue_from_numpy(array)

    @classmethod
    def ortvalue_from_shape_and_type(cls, shape: Any, kind: int, device: str = "cpu", number: int = 0) -> Any:
        cls.places.append((device, number))
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, kind)


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Let onnxruntime seem to have a GPU's providers, and return where its values are put."""
    value = type("Recording", (Value,), {"places": []})
    session = lambda path, options, providers: ort.InferenceSession(path, options, providers=[CPU])  # noqa: E731
    double = types.SimpleNamespace(OrtValue=value, InferenceSession=session, get_available_providers=lambda: [TENSORRT, CUDA, CPU])
    monkeypatch.setitem(sys.modules, "onnxruntime", double)  # type: ignore[arg-type]
    return value.places


@pytest.mark.parametrize(("providers", "place"), [
    ([CPU], ("cpu", 0)),
    ([CUDA, CPU], ("cuda", 0)),
    ([TENSORRT, CUDA, CPU], ("cuda", 0)),
    ([(TENSORRT, {"device_id": "1"}), (CUDA, {"device_id": "1"}), CPU], ("cuda", 1)),
    ([CPU, (CUDA, {"device_id": 2})], ("cuda", 2)),
])  # fmt: skip
def test_the_state_lies_where_a_provider_computes(
    deployed: Exported, places: list[tuple[str, int]], providers: list[Any], place: tuple[str, int]
) -> None:
    runner: Any = bw.load(deployed.folder, providers=providers)._runner
    for dtype in ("float32", "int64", "bfloat16"):
        value = runner.full("output_0", (2, 3), dtype, 0.0)
        assert runner.kind(value) == (dtype, (2, 3))
    assert set(places) == {place}
    assert len(places) == 3
    assert np.array_equal(runner.full("trigger", (1,), "int64", -1.0).numpy(), [-1])
