"""Node data for Model Explorer: of which operators, with which values."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import bwcache_compile as bw
from tests.models import OneStream

CONFIG = bw.CacheConfig(num_steps=6, threshold=math.inf, reuse_interval=1, tail=0.0)


@pytest.fixture
def cached() -> bw.CachedModel:
    return bw.transform(OneStream().eval(), CONFIG, example_args=OneStream().example(2))


def test_operators_are_those_of_the_exported_program(cached: bw.CachedModel, tmp_path: Path) -> None:
    bw.export(cached, tmp_path / "bundle", format="pt2")
    for step in range(6):
        cached(*OneStream().example(2, step=step))
    files = bw.write_node_data(tmp_path / "data", cached)
    assert [path.name for path in files] == ["reuse.json", "indicator.json"]
    reuse, indicator = (json.loads(path.read_text())["graph"]["results"] for path in files)
    computed, reused = (
        {node.name for node in torch.export.load(tmp_path / "bundle" / f"{kind}.pt2").graph.nodes if node.op == "call_function"}
        for kind in ("compute", "reuse")
    )
    assert set(reuse) <= computed
    skipped = {name for name, found in reuse.items() if found["value"] == "reused"}
    assert skipped == {"linear_2", "gelu", "linear_3", "add", "mul_1", "linear_4", "gelu_1", "linear_5", "add_1", "mul_2", "linear_6",
                       "gelu_2", "linear_7", "add_2", "mul"}  # fmt: skip
    assert not skipped & reused
    assert set(indicator) <= skipped
    report = cached.report()
    steps = [record.change for record in report.contexts["default"].steps if record.change is not None and record.gap is not None]
    means = torch.stack(steps).mean(0).tolist()
    assert [indicator[name]["value"] for name in ("gelu", "gelu_1", "gelu_2")] == pytest.approx(means, rel=1e-6)


def test_without_a_run_there_is_no_indicator(cached: bw.CachedModel, tmp_path: Path) -> None:
    assert [path.name for path in bw.write_node_data(tmp_path, cached)] == ["reuse.json"]


def test_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(bw.ConfigError, match="write_node_data expects the result of transform, got Linear"):
        bw.write_node_data(tmp_path / "data", torch.nn.Linear(1, 1))
    assert not list(tmp_path.iterdir())
