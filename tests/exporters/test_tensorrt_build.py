"""Builds of engines that are watched, refused or broken off."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from expecttest import assert_expected_inline

import bwcache_compile as bw
from bwcache_compile.exporters.tensorrt import engines as tensorrt
from tests.exporters.helpers import Exported
from tests.exporters.tensorrt_double import Double


def test_progress(trt: Double) -> None:
    seen: list[Any] = []
    monitor = tensorrt._monitor(trt, lambda *now: seen.append(now) or len(seen) < 2)
    assert isinstance(monitor, trt.real.IProgressMonitor)
    monitor.phase_start("tactics", None, 3)
    assert (monitor.step_complete("tactics", 0), monitor.step_complete("tactics", 1)) == (True, False)
    monitor.phase_finish("tactics")
    assert seen == [("tactics", 0, 3), ("tactics", 1, 3)]


def test_what_tensorrt_refuses_is_said(trt: Double, deployed: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Double, network: Any, logger: Any) -> Any:
        error = self.of(
            "ParserError", desc=lambda: "no such layer", node_name=lambda: "blocks.0.up/node_MatMul_3", node_operator=lambda: "MatMul"
        )
        return self.of("OnnxParser", parse_from_file=lambda path: False, num_errors=1, get_error=lambda i: error)

    monkeypatch.setattr(Double, "_OnnxParser", refuse)
    with pytest.raises(bw.ExportError) as refusal:
        tensorrt.build(deployed.folder, tmp_path)
    assert_expected_inline(
        str(refusal.value),
        """\
TensorRT cannot parse compute.onnx:
  MatMul blocks.0.up/node_MatMul_3: no such layer""",
    )
    trt.check()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(bw.ExportError, match=r'engines need NVIDIA TensorRT: pip install "bwcache-compile\[tensorrt\]"'):
        tensorrt.build(deployed.folder, tmp_path)


def test_a_build_that_breaks_off_leaves_the_engines(
    trt: Double, deployed: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Progress is where a build is broken off: here in the second graph, and while the record is written."""
    tensorrt.build(deployed.folder, tmp_path)
    before, write = {path.name: path.read_bytes() for path in tmp_path.iterdir()}, Path.write_text

    def interrupted(path: Path, text: str) -> int:
        write(path, text[: len(text) // 2])
        raise KeyboardInterrupt

    def fails(self: Double, network: Any, logger: Any) -> Any:
        parsed = self.of("OnnxParser", parse_from_file=lambda path: "reuse" not in path, num_errors=0)
        network.name = "another engine"
        return parsed

    for where, name, stands_in in ((Path, "write_text", interrupted), (Double, "_OnnxParser", fails)):
        with monkeypatch.context() as patched:
            patched.setattr(where, name, stands_in)
            with pytest.raises((KeyboardInterrupt, bw.ExportError)):
                tensorrt.build(deployed.folder, tmp_path, profiles=[{"x[1]": (2, 6, 8)}])
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    tensorrt.load(deployed.folder, tmp_path, device="cpu")
