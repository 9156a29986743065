"""A bundle holds the settings in force when it was exported, not those of the capture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

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


def test_a_reused_step_need_not_know_the_number_of_steps(tmp_path: Path) -> None:
    """It takes the weights of its anchors, and nothing of what decides."""
    model = OneStream(depth=2).eval()
    config = bw.CacheConfig(threshold=float("inf"), reuse_interval=2, tail=0.0, reuse="taylor")
    cached = bw.transform(model, config, example_args=model.example())
    want = generation(cached)
    bw.export(cached, tmp_path / "bundle")
    session = bw.load(tmp_path / "bundle")
    got = generation(session)
    assert "".join("#" if record.computed else "." for record in session.report().contexts["cond"].steps) == "##.."
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def generation(model: Any) -> list[Tensor]:
    """Run four steps, and say how many there are at the first two only, which are computed."""
    outputs = []
    for step in range(4):
        with model.cache_context("cond", num_inference_steps=6 if step < 2 else None):
            given = noise("x", step, 1, 6, 4), torch.full((1,), 1 - step / 8)
            outputs.append(torch.as_tensor(model(*(given if isinstance(model, torch.nn.Module) else (t.numpy() for t in given)))))
    return outputs
