"""Real model classes at tiny sizes: equality with the model, block counts, and every way of reusing against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import bwcache_compile as bw
from bwcache_compile import passes
from bwcache_compile.capture import capture
from bwcache_compile.config import Reuse
from bwcache_compile.runtime import Toolchain
from tests.reference import Oracle
from tests.zoo import ZOO, Entry

Transform = Callable[[bw.CacheConfig], bw.CachedModel]


@pytest.fixture(scope="module", params=list(ZOO))
def case(request: pytest.FixtureRequest) -> tuple[Entry, nn.Module]:
    entry = ZOO[request.param]
    return entry, entry.make()


@pytest.fixture(scope="module")
def transform(case: tuple[Entry, nn.Module]) -> Transform:
    """`bw.transform` with one capture for all settings: exporting is the slow part, and the same each time."""
    entry, model = case
    captured = capture(model, (), dict(sorted(entry.inputs(0).items())))
    toolchain = Toolchain(capture=lambda *_: captured.fresh(), build=passes.build, explain=passes.explain)
    return lambda config: bw.CachedModel(model, config, toolchain)


def block_modules(entry: Entry, model: nn.Module) -> list[nn.Module]:
    return [block for stack in entry.stacks for block in getattr(model, stack)]


def run(model: nn.Module, inputs: dict[str, Any]) -> Any:
    with torch.no_grad():
        return model(**inputs)


def test_threshold_zero_is_the_model_bit_for_bit(case: tuple[Entry, nn.Module]) -> None:
    entry, model = case
    cached = bw.transform(model, bw.CacheConfig(threshold=0, num_steps=4))
    for step in range(4):
        expected, actual = run(model, entry.inputs(step)), run(cached, entry.inputs(step))
        assert type(actual) is type(expected)
        assert torch.equal(actual.sample, expected.sample)
    assert [block.name for block in cached.blocks] == [f"{stack}.{i}" for stack, count in entry.stacks.items() for i in range(count)]
    assert cached.report().contexts["default"].computed == 4


def test_outputs_keep_their_structure(case: tuple[Entry, nn.Module]) -> None:
    entry, model = case
    inputs = entry.inputs(0) | {"return_dict": False}
    cached = bw.transform(model, bw.CacheConfig(threshold=0, num_steps=4))
    expected, actual = run(model, inputs), run(cached, inputs)
    assert type(actual) is tuple
    assert len(actual) == len(expected)
    assert torch.equal(actual[0], expected[0])


@pytest.mark.parametrize("reuse", ["output", "residual", "taylor"])
def test_static_mask_is_the_oracle(case: tuple[Entry, nn.Module], transform: Transform, reuse: Reuse) -> None:
    entry, model = case
    config = bw.CacheConfig(policy="static", steps_mask=(0, 1, 0, 1, 0, 1, 1), reuse=reuse)
    oracle = Oracle(model, block_modules(entry, model), entry.streams, config)
    cached = transform(config)
    full_differs = False
    for step in range(7):
        inputs = entry.inputs(step)
        actual = run(cached, inputs)
        clock = cached.plan.time_input
        expected = oracle(now=None if clock is None else float(inputs[clock]), **inputs)
        # the same operators on the same numbers, but residual sums may be taken in another layout
        torch.testing.assert_close(actual.sample, expected.sample, rtol=1e-5, atol=1e-6)
        full_differs |= not torch.allclose(actual.sample, run(model, inputs).sample, rtol=1e-3, atol=1e-3)
    assert full_differs, "the blocks hardly matter in this configuration, so the test shows nothing"


def test_schedule_decides_like_the_oracle(case: tuple[Entry, nn.Module], transform: Transform) -> None:
    entry, model = case
    config = bw.CacheConfig.paper(num_steps=12, threshold=0.5, reuse_interval=2, warmup_steps=2)
    oracle = Oracle(model, block_modules(entry, model), entry.streams, config)
    cached = transform(config)
    for step in range(12):
        inputs = entry.inputs(step)
        torch.testing.assert_close(run(cached, inputs).sample, oracle(**inputs).sample, rtol=1e-5, atol=1e-6)
        record = cached.report().contexts["default"].steps[-1]
        assert record.computed != oracle.reused
        if record.indicator is not None:
            assert record.indicator == pytest.approx(oracle.indicators[step], rel=1e-4)
    assert cached.report().contexts["default"].reused > 0
