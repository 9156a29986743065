"""reuse="linear": weighted sums of anchors by a rule or a table, cut at the blocks or at the output, in every form there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bwcache_compile as bw
from bwcache_compile.policies.reuse.linear import rule_weights
from tests.models import OneStream, TwoStream

MASK = (0, 0, 0, 1, 1, 0, 1, 0, 1, 1)
ROW = (1.5, -0.75, 0.25)
WEIGHTS = tuple(tuple(w + 0.125 * i * (-1) ** k * (k < 2) for k, w in enumerate(ROW)) if reuses else None for i, reuses in enumerate(MASK))
LINEAR: dict[str, Any] = {"policy": "static", "steps_mask": MASK, "reuse": "linear", "anchors": 3}


@pytest.fixture(scope="module")
def model() -> OneStream:
    return OneStream().eval().requires_grad_(False)


def generation(cached: Any, model: OneStream, steps: range = range(len(MASK))) -> list[Tensor]:
    return [cached(*model.example(step=step)) for step in steps]


def summed(anchors: list[Tensor], weights: tuple[float, ...]) -> Tensor:
    total: Tensor = sum((w * anchor.double() for w, anchor in zip(weights, anchors, strict=True)), torch.zeros_like(anchors[0]).double())
    return total.float()


def expected(model: OneStream, weights: Any = WEIGHTS, mask: tuple[int, ...] = MASK) -> list[Tensor]:
    """The sums of the model's outputs, or with `blocks` of what its blocks return, from their definition."""
    kept: list[Tensor] = []
    outputs = []
    for step, reuses in enumerate(mask):
        if not reuses:
            kept = [model(*model.example(step=step)), *kept]
        outputs.append(summed(kept[: len(ROW)], weights[step]) if reuses else kept[0])
    return outputs


def close(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(torch.as_tensor(a), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guard", ["host", "graph"])
@pytest.mark.parametrize("cut", ["blocks", "output"])
def test_a_table_of_weights(model: OneStream, cut: Any, guard: Any) -> None:
    """The head is linear, so that summing before it and behind it is the same."""
    cached = bw.transform(model, **LINEAR, cut=cut, weights=WEIGHTS, guard=guard)
    outputs = generation(cached, model)
    close(outputs, expected(model))
    for step, reuses in enumerate(MASK):
        if not reuses:
            assert torch.equal(outputs[step], model(*model.example(step=step)))
    assert cached.report().contexts["default"].reused == sum(MASK)


def test_nothing_of_the_model_runs_with_the_cut_at_its_output() -> None:
    two = TwoStream().eval().requires_grad_(False)
    cached = bw.transform(two, **LINEAR, cut="output", weights=WEIGHTS, example_args=two.example())
    read = cached.program.reuse.graph.find_nodes(op="get_attr")
    assert not read, "no weight of the model is read"
    assert "and all else of the model" in str(cached.plan)
    outputs = two(*two.example())
    leaves = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    times = 3 * 2 * 4
    assert cached.plan.state_bytes == sum(3 * leaf.nbytes for leaf in leaves) + times


def test_what_a_plan_prints_is_what_a_state_holds(model: OneStream) -> None:
    for anchors in (1, 2, 4):
        cached = bw.transform(model, **{**LINEAR, "anchors": anchors}, example_args=model.example())
        assert cached.init_state(model.example()).bytes == cached.plan.state_bytes
    one = bw.transform(model, **{**LINEAR, "anchors": 1}, example_args=model.example())
    held = bw.transform(model, policy="static", steps_mask=MASK, example_args=model.example())
    assert one.plan.state_bytes == held.plan.state_bytes
    assert [n.target for n in one.program.reuse.graph.nodes] == [n.target for n in held.program.reuse.graph.nodes]


def test_mask_and_table_are_replaced_without_a_capture(model: OneStream) -> None:
    cached = bw.transform(model, **LINEAR, cut="output")
    generation(cached, model)
    program, other = cached.program, (*MASK[:6], 0, *MASK[7:])
    weights = tuple(row if reuses else None for row, reuses in zip(WEIGHTS, other, strict=True))
    for mask, table in ((MASK, WEIGHTS), (other, weights)):
        cached.configure(steps_mask=mask, weights=table)
        cached.reset()
        close(generation(cached, model), expected(model, table, mask))
    assert cached.program is program
    assert cached.report().captures == 1


def test_a_row_is_used_for_its_own_anchors_alone(model: OneStream) -> None:
    """After a lost cache, the anchors are others than the table's: the rule takes over, here the line through two."""
    cached = bw.transform(model, **LINEAR, cut="output", weights=WEIGHTS)
    generation(cached, model, range(6))
    cached.invalidate()
    outputs = generation(cached, model, range(6, 10))
    assert [record.computed for record in cached.report().contexts["default"].steps][6:8] == [True, True], "the cache was dropped"
    anchors = [model(*model.example(step=step)) for step in (7, 6)]
    time = [model.example(step=step)[1] for step in (8, 7, 6)]
    slope = ((time[0] - time[1]) / (time[1] - time[2])).item()
    torch.testing.assert_close(outputs[2], anchors[0] + slope * (anchors[0] - anchors[1]), rtol=1e-5, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(0, 5), st.integers(1, 5), st.floats(-1, 1), st.randoms(use_true_random=False))
def test_the_rule_continues_polynomials(anchors: int, order: int, there: int, damping: float, random: Any) -> None:
    """Of a polynomial of the order, the value at this step; damped, a share of the way from the order below."""
    there = min(there, anchors)
    times = sorted(random.sample(range(1, 40), there + 1))
    now, kept = times[0], times[1:]
    slot = torch.full((anchors, 2), float("nan"))
    slot[:there] = torch.tensor([[float(t), float(100 - t)] for t in kept])
    weights = rule_weights(torch.tensor([now, 100.0 - now]), slot, torch.tensor([order]), torch.tensor([damping])).double().numpy()
    assert weights.shape == (anchors,)
    assert not weights[min(there, order + 1) :].any()
    used = min(order, there - 1)
    values = np.array([random.uniform(-1, 1) for _ in range(there)])

    def through(count: int) -> float:
        fitted = np.polynomial.Polynomial.fit(kept[: count + 1], values[: count + 1], count)
        return float(fitted(now))

    want = damping * through(used) + (1 - damping) * through(max(used - 1, 0))
    np.testing.assert_allclose(weights[:there] @ values, want, rtol=1e-3, atol=1e-3 * np.abs(weights).max())


@pytest.mark.parametrize("cut", ["blocks", pytest.param("output", marks=pytest.mark.slow)])
@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_in_a_bundle(model: OneStream, format: str, cut: Any, tmp_path: Path) -> None:
    cached = bw.transform(model, **LINEAR, cut=cut, weights=WEIGHTS, example_args=model.example())
    bw.export(cached, tmp_path / "bundle", format=format, guarded=format == "onnx")
    ways: list[dict[str, Any]] = [{"guarded": False}, {"guarded": True}] if format == "onnx" else [{"backend": "torch", "allow_code": True}]
    for options in ways:
        session = bw.load(tmp_path / "bundle", **options)

        def call(*args: Tensor, session: Any = session) -> Any:
            return session(*(arg if format == "pt2" else arg.numpy() for arg in args))

        close(generation(call, model), expected(model))
        plain = tuple(None if row is None else (1.0, 0.0, 0.0) for row in WEIGHTS)
        session.configure(weights=plain)
        close(generation(call, model), expected(model, plain))


def test_residuals_of_several_steps(model: OneStream) -> None:
    """With guards per block and residuals of two steps; a line through equal residuals is their residual."""
    config = {"policy": "static", "steps_mask": MASK, "granularity": "block", "reuse": "residual", "guard": "graph"}
    line = generation(bw.transform(model, **config, anchors=2), model)
    held = generation(bw.transform(model, **config), model)
    for step, reuses in enumerate(MASK):
        assert torch.equal(line[step], held[step]) == (not reuses)
    flat = tuple((1.0, 0.0) if reuses else None for reuses in MASK)
    close(generation(bw.transform(model, **config, anchors=2, weights=flat), model), held)


def test_sizes_stay_open_at_the_output(model: OneStream) -> None:
    cached = bw.transform(model, **LINEAR, cut="output", weights=WEIGHTS)
    for batch in (1, 2, 3):
        cached.reset()
        got = [cached(*model.example(batch=batch, step=step)) for step in range(4)]
        anchors = [model(*model.example(batch=batch, step=step)) for step in (2, 1, 0)]
        torch.testing.assert_close(got[3], summed(anchors, WEIGHTS[3]), rtol=1e-5, atol=1e-5)
    assert cached.report().captures == 2, "a program with dynamic sizes serves the third"


def test_settings_that_shape_graphs_make_them_anew_without_a_capture(model: OneStream) -> None:
    cached = bw.transform(model, num_steps=len(MASK))
    generation(cached, model)
    for config in (bw.CacheConfig(**LINEAR, cut="output", weights=WEIGHTS), bw.CacheConfig(policy="static", steps_mask=MASK[:8])):
        cached.configure(config)
        fresh = bw.transform(model, config)
        steps = range(len(config.steps_mask or ()))
        for got, want in zip(generation(cached, model, steps), generation(fresh, model, steps), strict=True):
            assert torch.equal(got, want)
    assert cached.report().captures == 1
    settings_before = cached.cache_config
    with pytest.raises(bw.ConfigError, match="compute_first=2 and compute_last=1 leave no block to cache"):
        cached.configure(compute_first=2, compute_last=1)
    assert cached.cache_config is settings_before
    assert torch.equal(cached(*model.example()), model(*model.example()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"anchors": 9}, "anchors is 9; it must be an int from 1 to 8."),
        ({"order": -1}, "order is -1; it must be an int from 0 to 7."),
        ({"damping": float("nan")}, "damping is nan; it must be a finite number."),
        ({"weights": WEIGHTS[:4]}, "weights has 4 rows, but steps_mask has 10 entries; it must hold a row or None for each step of"),
        ({"weights": 3}, "weights must hold a row of numbers or None for each step, got 3."),
        ({"weights": [None] * 3 + [(1, 1, 0)] + [None] * 6}, r"weights\[3\] is \(1.0, 1.0, 0.0\); it must hold 3 finite numbers"),
        ({"weights": WEIGHTS, "anchors": 4}, r"weights\[3\] is .*; it must hold 4 finite numbers"),
        ({"steps_mask": (0, 1), "weights": [None, (0.5, 0.5, 0.0)]}, r"weights\[1\] is \(0.5, 0.5, 0.0\), but only 1 steps were computed"),
        ({"anchors": 1, "weights": WEIGHTS}, "weights requires at least two anchors, but reuse='linear' keeps one."),
        ({"cut": "middle"}, "cut is 'middle'; choose one of 'blocks', 'output'."),
        ({"cut": "output", "reuse": "residual"}, "reuse='residual' adds to an input of the blocks, so it requires cut='blocks'"),
        (
            {"cut": "output", "compute_first": 1},
            "compute_first is 1; it must be 0 with cut='output', where a reused step computes no block.",
        ),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(bw.ConfigError, match=f"^{message}"):
        bw.CacheConfig(**{**LINEAR, **settings})


def test_settings_are_read_back(tmp_path: Path) -> None:
    config = bw.CacheConfig(**LINEAR, cut="output", weights=np.array([ROW if r else (1, 0, 0) for r in MASK]), damping=0.4, order=2)
    config.save(tmp_path / "config.json")
    assert bw.CacheConfig.load(tmp_path / "config.json") == config
