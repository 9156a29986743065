"""A bundle holds the settings in force when it was exported, not those of the capture."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import bwcache_compile as bw
from tests.models import OneStream, noise


def tuned() -> bw.CachedModel:
    model = OneStream(depth=2).eval()
    cached = bw.transform(model, bw.CacheConfig(num_steps=8), example_args=model.example())
    cached.configure(threshold=math.inf, num_steps=12, reuse_interval=3, tail=0.0, warmup_steps=2)
    return cached


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_a_bundle_holds_the_settings_in_force(tmp_path: Path, format: str) -> None:
    cached = tuned()
    bw.export(cached, tmp_path / "bundle", format)
    session = bw.load(tmp_path / "bundle", **({} if format == "onnx" else {"backend": "torch", "allow_code": True}))
    assert session.cache_config == cached.cache_config
    for step in range(12):
        x, t = noise("x", step, 1, 6, 4), torch.full((1,), 1 - step / 12)
        session(x, t) if format == "pt2" else session(x.numpy(), t.numpy())
        with torch.no_grad():
            cached(x, t)
    assert str(session.report()) == str(cached.report())
    assert "###...#" in str(session.report())


def test_a_later_joint_decision_is_refused(tmp_path: Path) -> None:
    cached = tuned()
    cached.configure(decide="joint")
    with pytest.raises(bw.ExportError, match="decide='joint' cannot be exported"):
        bw.export(cached, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
