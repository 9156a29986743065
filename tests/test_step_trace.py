"""The trace of a run: what it holds, for cached models and sessions, and what it refuses."""

from __future__ import annotations

import itertools
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import bwcache_compile as bw
from tests.exporters.helpers import export_one_stream
from tests.models import OneStream

CONFIG = bw.CacheConfig(num_steps=6, threshold=math.inf, reuse_interval=1, tail=0.0)


def generate(model: Any, context: str) -> None:
    for step in range(6):
        with torch.no_grad(), model.cache_context(context):
            model(*OneStream().example(2, step=step))


def read(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)["traceEvents"]


def test_a_run_is_a_process_with_a_thread_for_each_context(tmp_path: Path) -> None:
    cached = bw.transform(OneStream().eval(), CONFIG)
    with bw.trace_steps(tmp_path / "run.json", cached):
        generate(cached, "cond")
        generate(cached, "uncond")
    generate(cached, "cond")  # not recorded
    events = read(tmp_path / "run.json")
    names = {(event["name"], event["args"]["name"]) for event in events if event["ph"] == "M"}
    assert names == {("process_name", "OneStream"), ("thread_name", "cond"), ("thread_name", "uncond")}
    report = cached.report()
    for thread, name in enumerate(("cond", "uncond"), start=1):
        slices = [event for event in events if event["ph"] == "X" and event["tid"] == thread]
        records = report.contexts[name].steps
        assert [event["name"] for event in slices] == ["compute" if record.computed else "reuse" for record in records]
        assert [event["args"]["step"] for event in slices] == list(range(6))
        assert [event["args"]["indicator"] for event in slices] == [record.indicator for record in records]
        assert all(one["ts"] + one["dur"] <= following["ts"] for one, following in itertools.pairwise(slices))
        counted = [event["args"]["indicator"] for event in events if event["ph"] == "C" and event["tid"] == thread]
        assert counted == [record.indicator for record in records if record.indicator is not None]
    assert min(event["ts"] for event in events if event["ph"] == "X") == 0


def test_sessions_and_two_models(tmp_path: Path) -> None:
    made = export_one_stream(tmp_path / "bundle")
    session = bw.load(tmp_path / "bundle")
    with bw.trace_steps(tmp_path / "run.json", made.cached, session):
        generate(made.cached, "cond")
        generate(session, "cond")
    slices = [[event["name"] for event in read(tmp_path / "run.json") if event["ph"] == "X" and event["pid"] == pid] for pid in (1, 2)]
    assert slices[0] == slices[1]
    assert len(slices[0]) == 6


def test_what_was_recorded_before_a_failure_is_written(tmp_path: Path) -> None:
    cached = bw.transform(OneStream().eval(), CONFIG)

    def run() -> None:
        with bw.trace_steps(tmp_path / "run.json", cached):
            cached(*OneStream().example())
            raise RuntimeError("out of steps")

    with pytest.raises(RuntimeError, match="out of steps"):
        run()
    assert [event["name"] for event in read(tmp_path / "run.json") if event["ph"] == "X"] == ["compute"]


@pytest.mark.parametrize(("models", "got"), [((), "nothing"), ((torch.nn.Linear(1, 1),), "Linear")])
def test_other_models_are_refused(models: tuple[Any, ...], got: str, tmp_path: Path) -> None:
    with pytest.raises(bw.ConfigError, match=f"expects results of transform or load, got {got}"), bw.trace_steps(tmp_path / "x", *models):
        pass
    assert not list(tmp_path.iterdir())


def test_steps_are_rows_of_a_table() -> None:
    cached = bw.transform(OneStream().eval(), CONFIG)
    generate(cached, "cond")
    rows = cached.report().records()
    assert [row["step"] for row in rows] == list(range(6))
    assert {row["context"] for row in rows} == {"cond"}
    steps = cached.report().contexts["cond"].steps
    assert [(row["computed"], row["gap"], row["indicator"]) for row in rows] == [(s.computed, s.gap, s.indicator) for s in steps]


def test_tlparse_is_given_plan_and_diff(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, str] = {}

    class Handler(logging.Handler):
        def emit(self, record: Any) -> None:
            if "artifact" in record.metadata:
                found[record.metadata["artifact"]["name"]] = record.payload

    handler, log = Handler(), logging.getLogger("torch.__trace")
    log.addHandler(handler)
    try:
        cached = bw.transform(OneStream().eval(), CONFIG, example_args=OneStream().example())
    finally:
        log.removeHandler(handler)
    assert found["bwcache_plan"] == str(cached.plan)
    assert found["bwcache_graph_diff"] == str(cached.graph_diff()["whole"])
