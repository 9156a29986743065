"""Bundles in OpenVINO: what torch does, step by step, and named errors for what it cannot do."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bwcache_compile as bw
from tests.exporters.helpers import CONFIG, export_one_stream
from tests.models import OneStream, noise

pytest.importorskip("openvino", reason="needs the extra [openvino]")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return export_one_stream(tmp_path_factory.mktemp("openvino") / "bundle", guarded=True)


def call(step: int, batch: int = 3, tokens: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    return noise("x", step, batch, tokens, 4), torch.full((batch,), 1 - step / 8)


@pytest.mark.parametrize("guarded", [False, True])
def test_runs_as_torch_at_another_size(bundle: Any, guarded: bool) -> None:
    session = bw.load(bundle.folder, backend="openvino", guarded=guarded)
    bundle.cached.reset()
    for step in range(8):
        with torch.no_grad():
            expected = bundle.cached(*call(step)).numpy()
        actual = session(*call(step))
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * abs(expected).max())
    assert str(session.report()) == str(bundle.cached.report())
    assert "." in str(session.report())


@pytest.mark.parametrize("reuse", ["linear", *(pytest.param(reuse, marks=pytest.mark.slow) for reuse in ("residual", "taylor"))])
def test_every_way_of_reuse(reuse: str, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, reuse=reuse)
    cached = bw.transform(OneStream().eval(), config, example_args=OneStream().example())
    bw.export(cached, tmp_path / "bundle")
    session = bw.load(tmp_path / "bundle", backend="openvino")
    for step in range(8):
        inputs = OneStream().example(step=step)
        with torch.no_grad():
            expected = cached(*inputs).numpy()
        np.testing.assert_allclose(session(*inputs), expected, rtol=0, atol=1e-4 * abs(expected).max())
    assert str(session.report()) == str(cached.report())


def test_contexts_on_two_threads_equal_each_alone(bundle: Any) -> None:
    def generate(session: Any, name: str) -> list[Any]:
        made = []
        for step in range(8):
            with session.cache_context(name):
                made.append(session(noise(name, step, 2, 6, 4), torch.full((2,), 1 - step / 8)))
        return made

    alone = {name: generate(bw.load(bundle.folder, backend="openvino"), name) for name in ("cond", "uncond")}
    shared = bw.load(bundle.folder, backend="openvino")
    with ThreadPoolExecutor(2) as pool:
        together = dict(zip(alone, pool.map(lambda name: generate(shared, name), alone), strict=True))
    for name, expected in alone.items():
        for left, right in zip(together[name], expected, strict=True):
            np.testing.assert_array_equal(left, right)


def test_an_output_is_the_callers(bundle: Any) -> None:
    """A later step does not overwrite what an earlier one returned."""
    session = bw.load(bundle.folder, backend="openvino")
    first = session(*call(0))
    kept = first.copy()
    for step in range(1, 4):
        session(*call(step))
    np.testing.assert_array_equal(first, kept)


def test_the_precision_is_float32_unless_asked_for(bundle: Any) -> None:
    def precision(**options: Any) -> str:
        graph = bw.load(bundle.folder, backend="openvino", **options)._runner._graphs["compute"]
        return graph.get_property("INFERENCE_PRECISION_HINT").get_type_name()

    assert precision() == "f32"
    if precision(options={"INFERENCE_PRECISION_HINT": "bf16"}) == "f32":
        pytest.skip("needs a processor that computes in bfloat16")


def test_refusals(bundle: Any, tmp_path: Path) -> None:
    with pytest.raises(bw.BundleError, match=r"^OpenVINO cannot run .*compute\.onnx on NPU7 \(devices: CPU.*\): .*NPU7"):
        bw.load(bundle.folder, backend="openvino", device="NPU7")
    with pytest.raises(bw.ConfigError, match=r'^providers and outputs require backend="onnxruntime"\.$'):
        bw.load(bundle.folder, backend="openvino", outputs="numpy")
    with pytest.raises(bw.ConfigError, match=r'^backend must be "onnxruntime" or "openvino" for graphs of format "onnx", or left out'):
        bw.load(bundle.folder, backend="torch")
    session = bw.load(bundle.folder, backend="openvino")
    with pytest.raises(bw.StateError, match="x must have dtype float32, got float64"):
        session(call(0)[0].double(), call(0)[1])
    with pytest.raises(bw.StateError, match="cannot convert x to float32"):
        session("text", call(0)[1])


def test_bfloat16_is_refused_by_name(tmp_path: Path) -> None:
    model = OneStream().eval().to(torch.bfloat16)
    example = tuple(value.to(torch.bfloat16) for value in OneStream().example())
    bw.export(bw.transform(model, CONFIG, example_args=example), tmp_path / "bundle")
    with pytest.raises(bw.ConfigError, match=r"^x has dtype bfloat16, which numpy does not support, and backend='openvino'"):
        bw.load(tmp_path / "bundle", backend="openvino")
