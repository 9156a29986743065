"""Real model classes in ONNX Runtime, the pair and the guarded graph, beside torch over 8 steps.

All classes at both operator sets: `benchmarks/export_zoo.py`, whose results are in `benchmarks/results/export_zoo.json`.
"""

from __future__ import annotations

import pytest

from benchmarks.export_zoo import run


@pytest.mark.parametrize(
    ("name", "opset"),
    [
        ("wan", 23),
        ("latte", 20),
        *(pytest.param(name, opset, marks=pytest.mark.slow) for name, opset in (("hunyuan_video", 20), ("flux", 23), ("cogvideox", 23))),
    ],
)
def test_a_class_runs_as_in_torch(name: str, opset: int) -> None:
    result = run(name, [opset])[f"opset {opset}"]
    assert result["steps"] == "##..#..#"
    assert max(result["errors"].values()) <= 1e-4
