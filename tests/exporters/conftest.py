"""One ONNX bundle for all tests that only need a bundle, and what stands for TensorRT."""

from __future__ import annotations

import sys
import types

import pytest

from tests.exporters.helpers import Exported, export_one_stream
from tests.exporters.tensorrt_double import Double, bindings


@pytest.fixture(scope="session")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_one_stream(tmp_path_factory.mktemp("deployed") / "bundle", guarded=True)


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> types.ModuleType:
    return bindings(tmp_path_factory.mktemp("stubs"))


@pytest.fixture
def trt(real: types.ModuleType, deployed: Exported, monkeypatch: pytest.MonkeyPatch) -> Double:
    double = Double(real, deployed.manifest)
    monkeypatch.setitem(sys.modules, "tensorrt", double)
    return double
