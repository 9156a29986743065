"""Half precision: float16 runs on a CPU, bfloat16 is written and not run there, and says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

import bwcache_compile as bw
from bwcache_compile.exporters.check import tolerance_of
from tests.architectures.parts import WIDTH, Modulated
from tests.exporters.helpers import CONFIG
from tests.models import OneStream, noise


class Attending(OneStream):
    def __init__(self) -> None:
        super().__init__(width=WIDTH)
        self.blocks = nn.ModuleList(Modulated() for _ in range(3))

    def embed(self, t: Tensor) -> Tensor:
        return self.time(t.view(-1, 1))


def cached(dtype: torch.dtype) -> bw.CachedModel:
    example = (value.to(dtype) for value in OneStream().example(batch=2))
    return bw.transform(Attending().eval().to(dtype), CONFIG, example_args=tuple(example), dynamic_shapes="auto")


@pytest.mark.parametrize("opset", [20, 23])
def test_float16_runs_on_a_cpu(opset: int, tmp_path: Path) -> None:
    model = cached(torch.float16)
    report = bw.export(model, tmp_path / "bundle", guarded=True, opset=opset)["self_check"]
    assert report["runs"] == ["pair", "guarded"]
    assert report["largest_error"] < 5e-3
    for guarded in (False, True):
        session = bw.load(tmp_path / "bundle", guarded=guarded)
        model.reset()
        for step in range(8):
            x, t = noise("x", step, 3, 9, 4).half(), torch.full((3,), 1 - step / 8).half()
            with torch.no_grad():
                expected = model(x, t).float().numpy()
            actual = session(x.numpy(), t)
            assert actual.dtype == np.float16
            np.testing.assert_allclose(actual, expected, rtol=0, atol=5e-3 * abs(expected).max())
        assert str(session.report()).splitlines()[0].split()[-1] == "##..#..#"


class Rounding(OneStream):
    """A float32 model that rounds to bfloat16 on its way, as Kandinsky 5's rotary embedding."""

    def embed(self, t: Tensor) -> Tensor:
        return super().embed(t).bfloat16().float()


def test_rounding_inside_is_allowed_for() -> None:
    """Other kernels differ by a last bit, and such a bit decides how the next rounding falls."""
    for model, tolerance in ((OneStream(), 1e-4), (Rounding(), 5e-2)):
        made = bw.transform(model.eval(), CONFIG, example_args=model.example())
        assert tolerance_of(made.program) == tolerance


def test_bfloat16_is_written_and_a_cpu_refuses_it(tmp_path: Path) -> None:
    report = bw.export(cached(torch.bfloat16), tmp_path / "bundle", guarded=True)["self_check"]
    assert report["runs"] == "not run: ONNX Runtime's CPU provider has no bfloat16 matrix product; the CUDA provider and TensorRT have"
    for kind in ("compute", "reuse", "guarded"):
        graph = onnx.load(tmp_path / "bundle" / f"{kind}.onnx", load_external_data=False).graph
        assert graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16
    with pytest.raises(bw.BundleError) as refusal:
        bw.load(tmp_path / "bundle")
    message = str(refusal.value).replace(str(tmp_path), "...").replace(": [", ":\n[")
    assert_expected_inline(
        message,
        """\
.../bundle/compute.onnx does not run on CPUExecutionProvider:
[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find an implementation for MatMul(13) node with name 'patch/node_MatMul_3'
  The bundle is in bfloat16, and this provider lacks kernels for it. Use a GPU's, or export the model in float32 or float16.""",
    )
