"""Real model classes in ONNX Runtime and OpenVINO, the pair and the guarded graph, beside torch over 8 steps.

All classes at both operator sets: `benchmarks/export_zoo.py`, whose results are in `benchmarks/results/export_zoo.json`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from pathlib import Path

import pytest

import bwcache_compile as bw
from benchmarks.export_zoo import as_numpy, run
from benchmarks.zoo_runs import STEPS, compare
from tests.test_dynamic import FIRST, INPUTS, OTHERS
from tests.zoo import ZOO

LONGER = [
    pytest.param(name, opset, marks=pytest.mark.zoo)
    for name, opset in (("latte", 20), ("hunyuan_video", 20), ("flux", 23), ("cogvideox", 23))
]


@pytest.mark.parametrize(("name", "opset"), [("wan", 23), *LONGER])
def test_a_class_runs_as_in_torch(name: str, opset: int) -> None:
    result = run([opset], name)[f"opset {opset}"]
    assert result["steps"] == "##..#..#"
    assert max(result["errors"].values()) <= 1e-4
    if importlib.util.find_spec("openvino"):
        assert max(result["openvino"]["errors"].values()) <= 1e-4


@pytest.mark.zoo
@pytest.mark.parametrize(("name", "opset"), [("wan", 20), ("hunyuan_video", 23), ("flux", 23), ("cogvideox15", 20)])
def test_exported_at_one_size_and_run_at_three_others(name: str, opset: int, tmp_path: Path) -> None:
    """Other frame counts, heights and widths, batches and text lengths."""
    config = bw.CacheConfig(num_steps=STEPS, threshold=math.inf, reuse_interval=2)
    inputs = INPUTS[name]
    cached = bw.transform(ZOO[name].make(), config, example_kwargs=dict(sorted(inputs(0, FIRST).items())), dynamic_shapes="auto")
    bw.export(cached, tmp_path / "bundle", guarded=True, opset=opset)
    for guarded in (False, True):
        session = bw.load(tmp_path / "bundle", guarded=guarded)
        for size in OTHERS[1:4]:
            entry = dataclasses.replace(ZOO[name], inputs=lambda step, size=size: inputs(step, size))
            session.reset()
            pattern, worst = compare(entry, cached, session, as_numpy)
            assert (pattern, worst <= 1e-4) == ("##..#..#", True), (size, worst)
