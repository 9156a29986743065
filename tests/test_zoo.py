"""Real model classes at tiny sizes: equality with the model, block counts, and every way of reusing against the oracle.

Eight classes run by default; `-m zoo` runs the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bwcache_compile as bw
from bwcache_compile import passes
from bwcache_compile.ir.compare import flat_outputs
from bwcache_compile.ir.program import ModelProgram
from bwcache_compile.runtime import Toolchain
from tests.reference import Oracle
from tests.zoo import REFUSED, ZOO, Entry
from tests.zoo.reading import OMNIGEN
from tests.zoo.selection import selected


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with one capture for all tests: exporting is the slow part, and the same each time."""

    entry: Entry
    model: nn.Module
    captured: ModelProgram

    def transform(self, config: bw.CacheConfig, guard: passes.Guard = "host") -> bw.CachedModel:
        build = functools.partial(passes.build, guard=guard)
        toolchain = Toolchain(capture=lambda *_, **__: self.captured.fresh(), build=build, explain=passes.explain)
        return bw.CachedModel(self.model, config, toolchain)

    def oracle(self, config: bw.CacheConfig) -> Oracle:
        blocks = [self.model.get_submodule(name) for name in self.entry.block_names()]
        return Oracle(self.model, blocks, self.entry.streams, config, self.entry.rows, self.entry.continued)


@pytest.fixture(scope="module", params=selected(ZOO))
def case(request: pytest.FixtureRequest) -> Case:
    entry = ZOO[request.param]
    model = entry.make()
    return Case(entry, model, bw.transform(model, example_kwargs=entry.call(0)).program.fresh())


def run(model: nn.Module, inputs: dict[str, Any]) -> Any:
    with torch.no_grad():
        return model(**inputs)


def test_threshold_zero_is_the_model_bit_for_bit(case: Case) -> None:
    cached = case.transform(bw.CacheConfig(threshold=0, num_steps=4))
    for step in range(4):
        expected, actual = run(case.model, case.entry.inputs(step)), run(cached, case.entry.inputs(step))
        assert type(actual) is type(expected)
        for want, got in zip(flat_outputs(expected), flat_outputs(actual), strict=True):
            assert torch.equal(got, want)
    assert [block.name for block in cached.plan.blocks] == case.entry.block_names()
    assert cached.report().contexts["default"].computed == 4


@pytest.mark.parametrize("reuse", ["output", "residual", "taylor"])
def test_static_mask_is_the_oracle(case: Case, reuse: Any) -> None:
    config = bw.CacheConfig(policy="static", steps_mask=(0, 1, 0, 1, 0, 1, 1), reuse=reuse)
    cached = case.transform(config)
    oracle = case.oracle(config)
    full_differs = False
    for step in range(7):
        inputs = case.entry.inputs(step)
        warned = reuse in case.entry.warned and step == 0
        with pytest.warns(bw.CacheWarning, match=f"{case.entry.warned[reuse]} .* is not cached") if warned else contextlib.nullcontext():
            actual = run(cached, inputs)
        clock = cached.plan.time_input
        expected = oracle(now=None if clock is None else float(inputs[clock]), **inputs)
        # the same operators on the same numbers, but residual sums may be taken in another layout
        for want, got, full in zip(flat_outputs(expected), flat_outputs(actual), flat_outputs(run(case.model, inputs)), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
            full_differs |= not torch.allclose(got, full, rtol=1e-3, atol=1e-3)
    assert full_differs, "the blocks hardly matter in this configuration, so the test shows nothing"


def test_sums_of_the_models_outputs(case: Case) -> None:
    """With the cut at the output, a computed step is the model's own, and a reused one reads no weight of it."""
    mask, weights = (0, 0, 1, 0, 1), (1.75, -0.75)
    table = [weights if reuses else None for reuses in mask]
    cached = case.transform(bw.CacheConfig(policy="static", steps_mask=mask, reuse="linear", anchors=2, cut="output", weights=table))
    kept: list[list[Any]] = []
    for step, reuses in enumerate(mask):
        inputs = case.entry.inputs(step)
        got = flat_outputs(run(cached, inputs))
        if not reuses:
            kept = [flat_outputs(run(case.model, inputs)), *kept][:2]
            assert all(torch.equal(a, b) for a, b in zip(got, kept[0], strict=True))
            continue
        for actual, last, previous in zip(got, *kept, strict=True):
            expected = weights[0] * last.float() + weights[1] * previous.float()
            torch.testing.assert_close(actual.float(), expected, rtol=1e-4, atol=1e-5)
    assert not cached.program.reuse.graph.find_nodes(op="get_attr")


def test_schedule_decides_like_the_oracle(case: Case) -> None:
    config = bw.CacheConfig.paper(num_steps=12, threshold=0.5, reuse_interval=2, warmup_steps=2)
    oracle = case.oracle(config)
    cached = case.transform(config)
    for step in range(12):
        inputs = case.entry.inputs(step)
        for want, got in zip(flat_outputs(oracle(**inputs)), flat_outputs(run(cached, inputs)), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        record = cached.report().contexts["default"].steps[-1]
        assert record.computed != oracle.reused
        if record.indicator is not None:
            assert record.indicator == pytest.approx(oracle.indicators[step], rel=1e-4)
    assert cached.report().contexts["default"].reused > 0


def test_both_guards_agree(case: Case) -> None:
    config = bw.CacheConfig(policy="static", steps_mask=(0, 1, 0, 1))
    host, graph = case.transform(config), case.transform(config, guard="graph")
    for step in range(4):
        expected, actual = run(host, case.entry.inputs(step)), run(graph, case.entry.inputs(step))
        for want, got in zip(flat_outputs(expected), flat_outputs(actual), strict=True):
            assert torch.equal(got, want)
    assert [record.computed for record in graph.report().contexts["default"].steps] == [True, False, True, False]


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_cached_is_refused_by_name(name: str) -> None:
    entry = REFUSED[name]
    model = entry.make()
    run(model, entry.inputs(0))  # the configuration is right
    with pytest.raises(bw.CaptureError) as refusal:
        bw.transform(model, example_kwargs=entry.inputs(0))
    assert str(refusal.value).startswith(f"could not capture {entry.model} as one graph.\n")
    assert entry.never_captured in str(refusal.value)


def test_a_model_that_replaces_a_buffer_in_every_forward() -> None:
    """It also reads positions in Python. Its blocks are held by a hook, as it may not run beside the cached model."""
    model, mask, kept = OMNIGEN.make(), (False, True, False, True), []

    def hold(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        kept.append(kept[-1] if mask[len(kept)] else output)
        return kept[-1]

    with model.get_submodule(OMNIGEN.block_names()[-1]).register_forward_hook(hold):
        expected = [run(model, OMNIGEN.inputs(step)).sample for step in range(4)]
    cached = bw.transform(model, bw.CacheConfig(policy="static", steps_mask=mask))
    for step in range(4):
        assert torch.equal(run(cached, OMNIGEN.inputs(step)).sample, expected[step])
    assert [block.name for block in cached.plan.blocks] == OMNIGEN.block_names()
    assert cached.report().contexts["default"].reused == 2
    assert any(note.startswith("the values of position_ids are constants of the graph") for note in cached.plan.notes)


def test_outputs_keep_their_structure() -> None:
    entry = ZOO["dit"]
    model = entry.make()
    inputs = entry.inputs(0) | {"return_dict": False}
    expected, actual = run(model, inputs), run(bw.transform(model, bw.CacheConfig(num_steps=4)), inputs)
    assert type(actual) is tuple
    assert len(actual) == len(expected)
    assert torch.equal(actual[0], expected[0])
