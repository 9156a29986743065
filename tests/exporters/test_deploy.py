"""The example from torch to a bundle to a generation in a process where torch cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import bwcache_compile as bw

ROOT = Path(bw.__file__).parents[1]


@pytest.mark.slow
def test_the_example_generates_the_same_video_without_torch(tmp_path: Path) -> None:
    """Eight steps with both branches taken: any change is below the threshold."""
    command = [
        sys.executable,
        "examples/export_and_deploy.py",
        "--steps",
        "8",
        "--clips",
        "1",
        "--threshold",
        "inf",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "generated in a process that cannot import torch, diffusers or onnx" in done.stdout
    reports = [line.split() for line in done.stdout.splitlines() if line.startswith(("torch:", "without:"))]
    assert [report[-1] for report in reports] == ["#####.##", "#####.##"]
    decibels = float(done.stdout.split("against the cached run in torch:")[1].split()[0])
    assert decibels > 60
    assert {"clips.npy", "deployed.gif"} <= {path.name for path in tmp_path.iterdir()}
