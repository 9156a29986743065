"""reuse="taylor" follows the time where an input is seen to move, and counts steps where none is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bwcache_compile as bw
from tests.models import OneStream
from tests.passes.helpers import planned
from tests.reference import Oracle

CONFIG = bw.CacheConfig(policy="static", steps_mask=(0, 0, 1, 1, 0, 1), reuse="taylor")


class FrameRate(OneStream):
    """A float input of rank 1 that never changes beside a timestep of rank 2, as Cosmos."""

    def example(self, batch: int = 1, step: int = 0) -> tuple[Tensor, ...]:
        x, t = super().example(batch, step)
        return x, t.reshape(batch, 1).expand(batch, 2).contiguous(), torch.full((batch,), 24.0)

    def forward(self, x: Tensor, t: Tensor, fps: Tensor) -> Tensor:  # type: ignore[override]
        x, temb = self.patch(x), self.embed(t[:, :1] + fps.view(-1, 1) / 100)
        for block in self.blocks:
            x = block(x, temb)
        return self.head(x)


class Column(OneStream):
    """The timestep as a column [B, 1], and no other input that could be the time."""

    def example(self, batch: int = 1, step: int = 0) -> tuple[Tensor, ...]:
        x, t = super().example(batch, step)
        return x, t.reshape(batch, 1) ** 2  # steps of unequal length


@pytest.fixture(scope="module")
def model() -> FrameRate:
    return FrameRate().eval().requires_grad_(False)


def by_oracle(model: OneStream, times: Any = None) -> list[Tensor]:
    oracle = Oracle(model, list(model.blocks), ("x",), CONFIG)
    named = ("x", "t", "fps")
    return [oracle(now=times(step) if times else None, **dict(zip(named, model.example(step=step), strict=False))) for step in range(6)]


def differs_from_holding(model: OneStream, outputs: list[Tensor]) -> bool:
    held = bw.transform(model, bw.CacheConfig(policy="static", steps_mask=CONFIG.steps_mask))
    return not torch.allclose(outputs[2], [held(*model.example(step=step)) for step in range(3)][-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guard", ["host", "graph"])
def test_steps_count_where_the_input_does_not_move(model: FrameRate, guard: Any) -> None:
    cached = bw.transform(model, CONFIG, guard=guard)
    outputs = [cached(*model.example(step=step)) for step in range(6)]
    assert cached.plan.time_input == "fps"
    for output, want in zip(outputs, by_oracle(model), strict=True):
        torch.testing.assert_close(output, want, rtol=1e-5, atol=1e-6)
    assert differs_from_holding(model, outputs), "a held output would pass too"
    assert "extrapolates along fps, or along the step index while fps does not move" in str(cached.plan)


@pytest.mark.parametrize("format", ["onnx", pytest.param("pt2", marks=pytest.mark.slow)])
def test_steps_count_in_a_bundle(model: FrameRate, format: str, tmp_path: Path) -> None:
    cached = bw.transform(model, CONFIG, example_args=model.example())
    bw.export(cached, tmp_path / "bundle", format=format, guarded=format == "onnx")
    ways: list[dict[str, Any]] = [{"guarded": False}, {"guarded": True}] if format == "onnx" else [{"backend": "torch", "allow_code": True}]
    for options in ways:
        session = bw.load(tmp_path / "bundle", **options)
        for step, want in enumerate(by_oracle(model)):
            given = [value if format == "pt2" else value.numpy() for value in model.example(step=step)]
            torch.testing.assert_close(torch.as_tensor(session(*given)), want, rtol=1e-4, atol=1e-5)


def test_a_column_is_the_time_where_nothing_else_could_be() -> None:
    model = Column().eval().requires_grad_(False)
    cached = bw.transform(model, CONFIG)
    outputs = [cached(*model.example(step=step)) for step in range(6)]
    assert cached.plan.time_input == "t"
    for output, want in zip(outputs, by_oracle(model, lambda step: float(model.example(step=step)[1])), strict=True):
        torch.testing.assert_close(output, want, rtol=1e-5, atol=1e-6)
    assert planned(FrameRate(), CONFIG).planned().time_input == "fps", "rank 0 or 1 goes before a column"
