"""A mask with bounds on the indicator: it only adds computed steps, says which, and without bounds is the mask alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bwcache_compile as bw
from bwcache_compile.policies.guarded import guarded
from tests.models import OneStream

MASK = (0, 1, 0, 1, 1, 0, 1, 1, 1, 0)
GUARDED: dict[str, Any] = {"policy": "guarded", "steps_mask": MASK, "reuse": "linear", "anchors": 2}
STATIC = {**GUARDED, "policy": "static"}


@pytest.fixture(scope="module")
def model() -> OneStream:
    torch.manual_seed(0)
    return OneStream(depth=3).eval().requires_grad_(False)


def generation(called: Any, model: OneStream, arrays: bool = False) -> list[Tensor]:
    inputs = [model.example(step=step) for step in range(len(MASK))]
    return [torch.as_tensor(called(*(t.numpy() for t in given) if arrays else given)) for given in inputs]


def pattern(called: Any) -> str:
    (context,) = called.report().contexts.values()
    return "".join("#" if record.computed else "." for record in context.steps)


def indicators(called: Any) -> list[float | None]:
    (context,) = called.report().contexts.values()
    return [record.indicator for record in context.steps]


def bounds_at(step: int, bound: float) -> tuple[float | None, ...]:
    return tuple(bound if at == step else None for at in range(len(MASK)))


@pytest.mark.parametrize(("cut", "guard"), itertools.product(["blocks", "output"], ["host", "graph"]))
def test_without_a_bound_that_is_passed_it_is_the_mask_alone(model: OneStream, cut: Any, guard: Any) -> None:
    want = generation(bw.transform(model, STATIC, cut=cut, guard=guard), model)
    cached = bw.transform(model, GUARDED, cut=cut, guard=guard)
    for bounds in (None, (None,) * len(MASK), (None, *[1e9] * (len(MASK) - 1))):
        cached.configure(indicator_bounds=bounds)
        assert all(torch.equal(a, b) for a, b in zip(generation(cached, model), want, strict=True))
        assert pattern(cached) == "#.#..#...#"
        assert cached.report().warnings == ()


@pytest.mark.parametrize(("cut", "guard"), itertools.product(["blocks", "output"], ["host", "graph"]))
def test_beyond_a_bound_the_next_step_is_computed_and_reported(model: OneStream, cut: Any, guard: Any) -> None:
    cached = bw.transform(model, GUARDED, cut=cut, guard=guard)
    generation(cached, model)
    measured = indicators(cached)[5]
    assert measured is not None
    cached.configure(indicator_bounds=bounds_at(5, 1.01 * measured))
    generation(cached, model)
    assert pattern(cached) == "#.#..#...#"
    cached.configure(indicator_bounds=bounds_at(5, 0.99 * measured))
    outputs = generation(cached, model)
    assert pattern(cached) == "#.#..##..#", "one step, and then the mask again"
    assert cached.report().warnings == (
        f"default: step 6 was computed instead of reused: the indicator of step 5 was above {0.99 * measured:.3g}",
    )
    assert torch.equal(outputs[6], model(*model.example(step=6)))
    assert cached.report().captures == 1


def test_it_only_adds_computed_steps(model: OneStream) -> None:
    """The lower the bounds, the more steps are computed, and those of the mask always are."""
    cached, found = bw.transform(model, GUARDED), []
    for bound in (1e9, 0.06, 0.03, 0.01, 0.0):
        cached.configure(indicator_bounds=tuple(None if step == 0 or MASK[step] else bound for step in range(len(MASK))))
        outputs = generation(cached, model)
        computed = {record.step for record in cached.report().contexts["default"].steps if record.computed}
        assert computed >= {step for step, reuses in enumerate(MASK) if not reuses}
        assert all(torch.equal(outputs[step], model(*model.example(step=step))) for step in computed)
        assert len(cached.report().warnings) == len(computed) - MASK.count(0)
        found.append(computed)
    assert found[0] < found[-1]
    assert all(more >= fewer for fewer, more in itertools.pairwise(found))
    cached.configure(indicator_bounds=(0.0,) * len(MASK))
    generation(cached, model)
    assert pattern(cached) == "#" * len(MASK), "at the first step there is nothing to compare with, which is beyond every bound"


def test_a_lost_cache_is_no_step_that_was_added(model: OneStream) -> None:
    cached = bw.transform(model, GUARDED, indicator_bounds=(1e9,) * len(MASK))
    for step in range(len(MASK)):
        if step == 7:
            cached.invalidate()
        cached(*model.example(step=step))
    assert pattern(cached) == "###..#.###"
    assert [warning for warning in cached.report().warnings if "instead of reused" in warning] == [
        "default: step 1 was computed instead of reused: the indicator of step 0 was above 1e+09",
        "default: step 8 was computed instead of reused: the indicator of step 7 was above 1e+09",
    ]


def test_an_indicator_that_is_not_finite_is_beyond_every_bound() -> None:
    mask, step = torch.tensor([0, 1, 1, 0]), torch.tensor([0])
    for change, bound, left in (
        (0.5, 0.4, 0),
        (0.5, 0.5, 2),
        (float("nan"), 9.0, 0),
        (float("inf"), 9.0, 0),
        (float("nan"), float("inf"), 2),
    ):
        assert guarded(mask, torch.full((4,), bound), torch.tensor([change, change]), step).tolist() == [left]


@pytest.mark.parametrize("format", ["onnx", pytest.param("pt2", marks=pytest.mark.slow)])
def test_in_a_bundle(model: OneStream, format: str, tmp_path: Path) -> None:
    cached = bw.transform(model, GUARDED, cut="output", example_args=model.example())
    generation(cached, model)
    measured = indicators(cached)[5]
    assert measured is not None
    bw.export(cached, tmp_path / "bundle", format=format, guarded=format == "onnx")
    ways: list[dict[str, Any]] = [{"guarded": False}, {"guarded": True}] if format == "onnx" else [{"backend": "torch", "allow_code": True}]
    for options in ways:
        session = bw.load(tmp_path / "bundle", **options)
        for bounds in (None, bounds_at(5, 0.9 * measured)):
            cached.configure(indicator_bounds=bounds)
            session.configure(indicator_bounds=bounds)
            want = generation(cached, model)
            got = generation(session, model, arrays=format == "onnx")
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
            assert pattern(session) == pattern(cached) == ("#.#..#...#" if bounds is None else "#.#..##..#")
            assert session.report().warnings == cached.report().warnings
