"""Half precision: float16 runs on a CPU, bfloat16 by a stand-in there, and operators that lack a dtype compute in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

import bwcache_compile as bw
from bwcache_compile.bundle.files import Bundle
from bwcache_compile.bundle.runners.ort import OrtRunner
from bwcache_compile.exporters.check import tolerance_of
from bwcache_compile.exporters.onnx import export as exporting
from bwcache_compile.exporters.onnx.stand_in import stand_in
from tests.architectures.parts import WIDTH, Modulated
from tests.exporters.helpers import CONFIG
from tests.models import OneStream, noise


class Attending(OneStream):
    def __init__(self) -> None:
        super().__init__(width=WIDTH)
        self.blocks = nn.ModuleList(Modulated() for _ in range(3))

    def embed(self, t: Tensor) -> Tensor:
        return self.time(t.view(-1, 1))


class Convolving(Attending):
    """Has what ONNX defines for bfloat16 late or otherwise than torch: a convolution, and a norm of float32 by half weights."""

    def __init__(self) -> None:
        super().__init__()
        self.taken, self.scale = nn.Conv1d(4, WIDTH, 1), nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = nn.functional.rms_norm(self.taken(x.mT).mT.float(), (WIDTH,), self.scale).to(x.dtype)
        return super().forward(x, t) + self.head(y)


def cached(dtype: torch.dtype) -> bw.CachedModel:
    example = (value.to(dtype) for value in OneStream().example(batch=2))
    return bw.transform(Attending().eval().to(dtype), CONFIG, example_args=tuple(example), dynamic_shapes="auto")


@pytest.mark.parametrize("opset", [pytest.param(20, marks=pytest.mark.slow), 23])
def test_float16_runs_on_a_cpu(opset: int, tmp_path: Path) -> None:
    model = cached(torch.float16)
    report = bw.export(model, tmp_path / "bundle", guarded=True, opset=opset).self_check
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


STAND_IN = (
    "operators on bfloat16 ran in float32 between casts: ONNX Runtime's CPU provider has no bfloat16 matrix product;"
    " the CUDA provider and TensorRT have"
)


def test_bfloat16_is_written_and_checked_by_a_stand_in_and_a_cpu_refuses_it(tmp_path: Path) -> None:
    report = bw.export(cached(torch.bfloat16), tmp_path / "bundle", guarded=True).self_check
    assert (report["runs"], report["steps"], report["stand_in"]) == (["pair", "guarded"], "##..#.", STAND_IN)
    assert report["largest_error"] <= 2e-2
    assert sorted(path.name for path in (tmp_path / "bundle").iterdir()) == [
        "compute.onnx", "guarded.onnx", "manifest.json", "reuse.onnx", "weights.bin",
    ]  # fmt: skip
    for kind in ("compute", "reuse", "guarded"):
        graph = onnx.load(tmp_path / "bundle" / f"{kind}.onnx", load_external_data=False).graph
        assert graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16
    with pytest.raises(bw.BundleError) as refusal:
        bw.load(tmp_path / "bundle")
    message = str(refusal.value).replace(str(tmp_path), "...").replace(": [", ":\n[")
    assert_expected_inline(
        message,
        """\
CPUExecutionProvider cannot run .../bundle/compute.onnx:
[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find an implementation for MatMul(13) node with name 'patch/node_MatMul_3'
  The bundle computes in bfloat16, and this provider lacks kernels for it. Use a GPU, or export the model in float32 or float16.""",
    )


@pytest.mark.parametrize(
    ("dtype", "opset"),
    [(torch.bfloat16, 20), *(pytest.param(dtype, 23, marks=pytest.mark.slow) for dtype in (torch.bfloat16, torch.float16))],
)
def test_operators_that_lack_a_dtype_compute_in_float32(dtype: torch.dtype, opset: int, tmp_path: Path) -> None:
    model = bw.transform(Convolving().eval().to(dtype), CONFIG, example_args=tuple(v.to(dtype) for v in OneStream().example()))
    report = bw.export(model, tmp_path / "bundle", guarded=True, opset=opset).self_check
    assert (report["runs"], report["largest_error"] <= 2e-2) == (["pair", "guarded"], True)
    graph = onnx.load(tmp_path / "bundle" / "compute.onnx", load_external_data=False).graph
    (convolution,) = [node for node in graph.node if node.op_type == "Conv"]
    cast = {name for node in graph.node if node.op_type == "Cast" for name in node.output}
    assert (convolution.input[0] in cast) == (dtype == torch.bfloat16 and opset == 20)


def test_a_graph_that_does_not_open_is_no_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "computes_in_half", lambda model: False)
    with pytest.raises(bw.ExportError, match=r"^the exported bundle does not open: CPUExecutionProvider cannot run .*/compute\.onnx: "):
        bw.export(cached(torch.bfloat16), tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_stand_in_shows_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(bundle: Bundle) -> Bundle:
        made = stand_in(bundle)
        path = made.graph_file("reuse")
        model = onnx.load(path, load_external_data=False)
        next(node for node in model.graph.node if node.op_type == "Add").op_type = "Sub"
        onnx.save(model, path)
        return made

    monkeypatch.setattr(exporting, "stand_in", spoilt)
    where = r"step 2: the output output of the exported graphs differs from torch by.*\n  Operators of the reuse graph that differ first"
    with pytest.raises(bw.ExportError, match=where):
        bw.export(cached(torch.bfloat16), tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("around", [pytest.param(False, marks=pytest.mark.slow), True])
def test_autocast_around_a_capture_is_written_out(around: bool, tmp_path: Path) -> None:
    """The export does as the capture did, whatever is around it."""
    model, example = Attending().eval(), OneStream().example()
    with torch.autocast("cpu", torch.bfloat16, enabled=not around):
        made = bw.transform(model, CONFIG, example_args=example)
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        report = bw.export(made, tmp_path / "onnx").self_check
        bw.export(made, tmp_path / "pt2", format="pt2")
        session = bw.load(tmp_path / "pt2", backend="torch", allow_code=True)
        exported = [session(*OneStream().example(step=step)) for step in range(8)]
    assert (report["steps"], "stand_in" in report) == ("##..#.", not around)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=not around):
        for step, actual in enumerate(exported):
            expected = made(*OneStream().example(step=step))
            assert expected.dtype == (torch.float32 if around else torch.bfloat16)
            assert torch.equal(actual, expected)


def test_a_state_in_bfloat16_is_no_numpy_array() -> None:
    value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.zeros(2, dtype=np.uint16), onnx.TensorProto.BFLOAT16)
    with pytest.raises(bw.StateError, match="bfloat16, which numpy does not support"):
        OrtRunner.host(OrtRunner.__new__(OrtRunner), value)
