"""The life of a session: runs that are broken off, repeated or shorter than told leave nothing in the next one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bwcache_compile as bw
from bwcache_compile.bundle.session import Session
from tests.exporters.helpers import opened
from tests.models import OneStream, noise

CONFIG = bw.CacheConfig(policy="static", steps_mask=(0, 1, 1, 0, 1, 1, 0, 1))
DTYPES = [torch.float32, torch.bfloat16, torch.int64]


class Timed(OneStream):
    """Takes times of any dtype."""

    def embed(self, t: Tensor) -> Tensor:
        return super().embed(t.float() / 1000)


def inputs(video: str, step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return noise(video, step, 1, 6, 4), torch.full((1,), 1000 - 125 * step).to(dtype)


@dataclasses.dataclass(frozen=True)
class Deployed:
    """Bundles of one model whose time has one dtype."""

    dtype: torch.dtype
    onnx: Path
    pt2: Path

    def session(self, kind: str) -> Session:
        if kind == "pt2":
            return opened(self.pt2)
        if kind == "openvino":
            pytest.importorskip("openvino", reason="needs the extra [openvino]")
            if self.dtype == torch.bfloat16:
                pytest.skip("needs numpy arrays in bfloat16")
            return bw.load(self.onnx, backend="openvino")
        return bw.load(self.onnx, guarded=kind == "guarded")


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def timed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    folder = tmp_path_factory.mktemp("timed")
    cached = bw.transform(Timed(depth=2).eval(), CONFIG, example_args=inputs("first", 0, request.param))
    bw.export(cached, folder / "onnx", guarded=True)
    bw.export(cached, folder / "pt2", format="pt2")
    return Deployed(request.param, folder / "onnx", folder / "pt2")


def call(session: Session, video: str, step: int, dtype: torch.dtype) -> Any:
    return torch.as_tensor(session(*inputs(video, step, dtype)))


@pytest.mark.parametrize("kind", ["pair", "guarded", "pt2", "openvino"])
@pytest.mark.parametrize("broken_off", [2, pytest.param(3, marks=pytest.mark.slow), 5])
def test_a_request_after_one_that_was_broken_off(timed: Deployed, kind: str, broken_off: int) -> None:
    session = timed.session(kind)
    whole = [call(session, "second", step, timed.dtype) for step in range(8)]
    for step in range(broken_off):
        call(session, "first", step, timed.dtype)
    for step in range(8):
        assert torch.equal(call(session, "second", step, timed.dtype), whole[step]), "the first video is in the second"
    assert session.report().warnings == (f"default: the timestep went back before step {broken_off}: a new generation began",)


@pytest.mark.parametrize("kind", ["pair", "guarded", "pt2", "openvino"])
def test_two_calls_at_one_time_are_refused(timed: Deployed, kind: str) -> None:
    session = timed.session(kind)
    call(session, "first", 0, timed.dtype)
    if timed.dtype == torch.bfloat16:  # equal times are no proof there: the step computes
        fresh = timed.session(kind)
        assert torch.equal(call(session, "second", 0, timed.dtype), call(fresh, "second", 0, timed.dtype))
    else:
        with pytest.raises(bw.StateError, match=r"^two consecutive calls have the same timestep"):
            call(session, "second", 0, timed.dtype)


@pytest.mark.parametrize("kind", ["pair", "pt2", "openvino"])
def test_a_generation_frees_its_cache_at_its_last_step(timed: Deployed, kind: str) -> None:
    session = timed.session(kind)
    for step in range(7):
        call(session, "first", step, timed.dtype)
    assert session.state("default")
    call(session, "first", 7, timed.dtype)
    with pytest.raises(bw.StateError, match=r"^context 'default' has no cache: it was not called yet, or its generation has ended"):
        session.state("default")
    assert session.report().contexts["default"].state_bytes > 0


@pytest.mark.parametrize("kind", ["pair", "guarded", "pt2"])
def test_sessions_of_other_settings_share_the_graphs(timed: Deployed, kind: str) -> None:
    masks = {"half": (0, 1, 0, 1, 0, 1, 0, 1), "none": (0,) * 8}
    first = timed.session(kind)
    others = {name: first.with_settings(steps_mask=mask) for name, mask in masks.items()}
    alone = {name: timed.session(kind) for name in masks}
    for name, mask in masks.items():
        alone[name].configure(steps_mask=mask)
    for step in range(8):
        call(first, "first", step, timed.dtype)
        for name in masks:
            mine, want = (call(session[name], "second", step, timed.dtype) for session in (others, alone))
            assert torch.equal(mine, want), (name, step)
    computed = {name: [r.computed for r in session.report().contexts["default"].steps] for name, session in others.items()}
    assert computed == {name: [not reused for reused in mask] for name, mask in masks.items()}
    assert [r.computed for r in first.report().contexts["default"].steps] == [not reused for reused in CONFIG.steps_mask or ()]
    with pytest.raises(bw.ConfigError, match=r"the graphs depend on reuse"):
        first.with_settings(reuse="residual")
