"""Samples of a batch that decide by themselves, beside the same samples run alone."""

from __future__ import annotations

import dataclasses
import functools
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import bwcache_compile as bw
from tests.models import OneStream, TwoStream

STEPS, BATCH = 30, 5
ADAPTIVE = bw.CacheConfig(policy="adaptive", threshold=0.1, reuse="taylor", num_steps=STEPS, batch_reduce="per_sample")
SCHEDULE = bw.CacheConfig(threshold=0.15, reuse="output", num_steps=STEPS, reuse_interval=2, warmup_steps=1, batch_reduce="per_sample")
MASK = tuple(int(step % 3 > 0) for step in range(STEPS))


def sample(number: int, step: int, tokens: int = 40) -> tuple[Tensor, Tensor]:
    """One sample of one step: each moves at a pace of its own, some by fits and starts."""
    generator = torch.Generator().manual_seed(100 + number)
    base, drift = torch.randn(2, 1, tokens, 4, generator=generator)
    moved = 0.3 * (number + 1) * (0.5 + 0.07 * number) ** step * (1 + step * (number + 3) % 5)
    return base + moved * drift, torch.full((1,), 1 - step / 32)


def batch(numbers: list[int], steps: list[int]) -> tuple[Tensor, Tensor]:
    parts = [sample(number, step) for number, step in zip(numbers, steps, strict=True)]
    return torch.cat([x for x, _ in parts]), torch.cat([t for _, t in parts])


@functools.cache
def single(config: bw.CacheConfig) -> bw.CachedModel:
    """Return a cached model for batches of one sample; all models of a class have the same weights."""
    return bw.transform(OneStream().eval(), dataclasses.replace(config, batch_reduce="joint"))


@functools.cache
@torch.no_grad()
def alone(config: bw.CacheConfig, number: int, steps: int = STEPS) -> tuple[list[Tensor], str]:
    """Return the outputs of a sample that is run by itself, and which steps it computed."""
    cached = single(dataclasses.replace(config, num_steps=None))
    outputs, name = [], f"{number} of {config.num_steps}, {steps} steps"
    for step in range(steps):
        with cached.cache_context(name, num_inference_steps=config.num_steps):
            outputs.append(cached(*sample(number, step)))
    return outputs, pattern(cached, name)


def pattern(cached: Any, name: str) -> str:
    return "".join("#" if record.computed else "." for record in cached.report().contexts[name].steps)


def close(actual: Tensor, expected: Tensor) -> None:
    assert float((actual - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize(
    "config",
    [
        ADAPTIVE,
        SCHEDULE,
        pytest.param(dataclasses.replace(SCHEDULE, reuse="residual", indicator_tokens="all"), marks=pytest.mark.slow),
        pytest.param(
            dataclasses.replace(
                ADAPTIVE, reuse="linear", anchors=3, order=2, damping=0.5, cut="output", indicator_tokens=7, indicator_blocks=2
            ),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            bw.CacheConfig(policy="guarded", steps_mask=MASK, indicator_bounds=(0.1,) * STEPS, batch_reduce="per_sample"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["adaptive", "schedule", "residual", "output", "guarded"],
)
def test_each_sample_decides_as_it_does_alone(model: OneStream, config: bw.CacheConfig) -> None:
    cached = bw.transform(model, config)
    with torch.no_grad():
        outputs = [cached(*batch(list(range(BATCH)), [step] * BATCH)) for step in range(STEPS)]
    patterns = set()
    for number in range(BATCH):
        expected, computed = alone(config, number)
        assert pattern(cached, f"{number}/default") == computed
        patterns.add(computed)
        for step in range(STEPS):
            close(outputs[step][number : number + 1], expected[step])
    assert len(patterns) > 2, "the samples differ"
    assert set(cached.batch_sizes) <= {1, 2, 4, BATCH}
    assert len(cached.cached_programs) <= 2, "one for a single sample, one of dynamic sizes"


@pytest.mark.slow
def test_graphs_are_compiled_for_a_bounded_set_of_sizes(model: OneStream, fresh_compiler: None) -> None:
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    cached = bw.transform(model, ADAPTIVE)
    cached.compile(backend=backend)
    with torch.no_grad():
        for step in range(STEPS):
            output = cached(*batch(list(range(BATCH)), [step] * BATCH))
    close(output[1:2], alone(ADAPTIVE, 1)[0][-1])
    assert len(compiled) <= 2 * len(cached.batch_sizes)
    count = len(compiled)
    cached.warm_up(*[batch(list(range(BATCH)), [0] * BATCH)])
    cached.reset()
    with torch.no_grad():
        for step in range(STEPS):
            cached(*batch(list(range(BATCH)), [step] * BATCH))
    assert len(compiled) <= max(count, 2 * 4)


def test_padding_changes_nothing(model: OneStream) -> None:
    """Three samples run at batch size 4: the outputs are those of the three alone."""
    cached = bw.transform(model, ADAPTIVE, example_args=batch([0, 1, 2, 3], [0] * 4))
    with torch.no_grad():
        for step in range(12):
            numbers = [0, 1, 2] if step else [0, 1, 2, 3]
            with cached.cache_context("c", rows=[str(number) for number in numbers]):
                outputs = cached(*batch(numbers, [step] * len(numbers)))
            for place, number in enumerate(numbers):
                close(outputs[place : place + 1], alone(ADAPTIVE, number, step + 1)[0][-1]) if step in (5, 11) else None
    assert cached.batch_sizes[-1] == 4


def test_rows_come_and_go(model: OneStream) -> None:
    """Continuous batching: requests begin, end and change places, at steps of their own and of other numbers of steps."""
    cached = bw.transform(model, ADAPTIVE)
    begins, lengths = {0: 0, 1: 2, 2: 3, 3: 9, 4: 11}, {0: 30, 1: 20, 2: 8, 3: 30, 4: 22}
    outputs: dict[int, list[Tensor]] = {number: [] for number in begins}
    with torch.no_grad():
        for tick in range(39):
            numbers = [n for n in begins if begins[n] <= tick < begins[n] + lengths[n]]
            numbers = numbers[:: -1 if tick % 3 else 1]
            steps = [tick - begins[n] for n in numbers]
            rows = [f"request {n}" for n in numbers]
            with cached.cache_context("c", rows=rows, step_index=steps, num_inference_steps=[lengths[n] for n in numbers]):
                returned = cached(*batch(numbers, steps))
            for place, number in enumerate(numbers):
                outputs[number].append(returned[place : place + 1])
    for number, length in lengths.items():
        config = dataclasses.replace(ADAPTIVE, num_steps=length)
        expected, computed = alone(config, number, length)
        assert pattern(cached, f"request {number}/c") == computed
        for actual, wanted in zip(outputs[number], expected, strict=True):
            close(actual, wanted)
    cached.drop_row("request 0")
    assert "request 0/c" not in cached.report().contexts


def test_rows_move_to_another_model_and_through_host_memory(model: OneStream) -> None:
    one, other = bw.transform(model, ADAPTIVE), bw.transform(model, ADAPTIVE)
    outputs: dict[int, list[Tensor]] = {0: [], 1: [], 2: []}

    def run(cached: bw.CachedModel, numbers: list[int], step: int) -> None:
        with cached.cache_context("c", rows=[str(n) for n in numbers]):
            returned = cached(*batch(numbers, [step] * len(numbers)))
        for place, number in enumerate(numbers):
            outputs[number].append(returned[place : place + 1])

    with torch.no_grad():
        for step in range(10):
            run(one, [0, 1, 2], step)
        before = one.row_state("1", "c")
        store = bw.RowStore(2 * before.bytes)
        for name in ("1", "2"):
            store.save(name, one.row_state(name, "c"))
            one.drop_row(name)
        with pytest.raises(bw.StateError, match=rf"takes {before.bytes} bytes, and {2 * before.bytes} of {2 * before.bytes} are taken"):
            store.save("0", one.row_state("0", "c"))
        assert (len(store), store.bytes, before.next_step) == (2, 2 * before.bytes, 10)
        run(one, [0], 10)
        other.put_row_state("2", pickle.loads(pickle.dumps(store.take("2"))), "c")
        other.put_row_state("1", store.take("1"), "c")
        for step in range(10, STEPS):
            run(other, [2, 1], step)
        for step in range(11, STEPS):
            run(one, [0], step)
    assert (len(store), "1" in store) == (0, False)
    for number, cached in ((0, one), (1, other), (2, other)):
        expected, computed = alone(ADAPTIVE, number)
        assert pattern(cached, f"{number}/c") == computed
        for actual, wanted in zip(outputs[number], expected, strict=True):
            close(actual, wanted)


def test_a_state_of_another_model_is_refused(model: OneStream) -> None:
    cached = bw.transform(model, ADAPTIVE)
    with torch.no_grad():
        cached(*batch([0, 1], [0, 0]))
    state = cached.row_state("1")
    with pytest.raises(bw.StateError, match="there is a context '1/default' already"):
        cached.put_row_state("1", state)
    with pytest.raises(bw.StateError, match=r"there is no row '7/default'. Rows: 0/default, 1/default"):
        cached.row_state("7")
    stranger = bw.transform(OneStream(depth=2).eval(), ADAPTIVE)
    with pytest.raises(bw.StateError, match="this state was made by OneStream, float32, weights"):
        stranger.put_row_state("1", state)
    changed = cached.with_settings(dataclasses.replace(ADAPTIVE, reuse="output"))
    changed.put_row_state("0", state)
    with torch.no_grad():
        changed(*batch([1, 0], [1, 0]))
    assert changed.report().contexts["0/default"].events == ("the program changed before step 1: the cache was cleared",)


def test_guidance_and_samples_have_states_of_their_own(model: OneStream) -> None:
    cached = bw.transform(model, ADAPTIVE)
    with torch.no_grad():
        for step in range(8):
            for name, numbers in (("cond", [0, 1]), ("uncond", [2, 3])):
                with cached.cache_context(name):
                    cached(*batch(numbers, [step, step]))
    found = {name: pattern(cached, name) for name in cached.report().contexts}
    expected = {"0/cond": 0, "1/cond": 1, "0/uncond": 2, "1/uncond": 3}
    assert found == {name: alone(ADAPTIVE, number, 8)[1] for name, number in expected.items()}


@pytest.mark.slow
def test_inputs_without_a_batch_are_passed_as_they_are(model: OneStream) -> None:
    """A time that all samples share, and text that each has."""
    two = TwoStream().eval()
    cached, text = bw.transform(two, ADAPTIVE), torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(3))
    reference = bw.transform(two, dataclasses.replace(ADAPTIVE, batch_reduce="joint"))
    with torch.no_grad():
        for step in range(12):
            x, t = batch([0, 1, 2, 3], [step] * 4)
            outputs = cached(x, text, t[:1])
            with reference.cache_context("2"):
                close(outputs[2:3], reference(x[2:3], text[2:3], t[:1]))
    assert pattern(cached, "2/default") == pattern(reference, "2")
    assert len({pattern(cached, f"{i}/default") for i in range(4)}) > 1


def test_a_call_that_fails_leaves_every_row_as_it_was(model: OneStream) -> None:
    cached = bw.transform(model, ADAPTIVE)
    with torch.no_grad():
        for step in range(4):
            cached(*batch([0, 1, 2], [step] * 3))
        states = [cached.row_state(str(i)) for i in range(3)]
        with pytest.raises(bw.StateError, match="step_index must be from 0 to 29, got 30"):  # noqa: SIM117
            with cached.cache_context("default", rows=["0", "1", "2"], step_index=[4, 4, 30]):
                cached(*batch([0, 1, 2], [4] * 3))
        assert [cached.row_state(str(i)) for i in range(3)] == states
        close(cached(*batch([0, 1, 2], [4] * 3))[1:2], alone(ADAPTIVE, 1, 5)[0][-1])


def test_steps_are_told_for_each_sample(model: OneStream) -> None:
    cached, told = bw.transform(model, ADAPTIVE), []
    cached.on_step(told.append)
    with torch.no_grad():
        for step in range(3):
            cached(*batch([0, 1], [step] * 2))
    assert [(event.context, event.step) for event in told] == [(f"{i}/default", step) for step in range(3) for i in range(2)]


def test_max_follows_the_sample_that_changes_most(model: OneStream) -> None:
    numbers = [0, 1, 2]
    exact = dataclasses.replace(SCHEDULE, threshold=0, batch_reduce="per_sample")
    each, cached = bw.transform(model, exact), bw.transform(model, dataclasses.replace(SCHEDULE, batch_reduce="max"))
    with torch.no_grad():
        for step in range(STEPS):
            each(*batch(numbers, [step] * 3))
            cached(*batch(numbers, [step] * 3))
    found = cached.report().contexts["default"].steps
    trigger = next(record.step for record in found if not record.computed) - 1
    alone_at = [[record.indicator or 0.0 for record in each.report().contexts[f"{i}/default"].steps] for i in numbers]
    for step in range(1, trigger + 1):
        largest = max(indicators[step] for indicators in alone_at)
        assert found[step].indicator == pytest.approx(largest, rel=1e-5)
        assert (largest < SCHEDULE.threshold) == (step == trigger)
    assert any(min(indicators[1:trigger]) < SCHEDULE.threshold for indicators in alone_at), "one sample alone would have triggered before"


def test_the_plan_says_who_decides(model: OneStream) -> None:
    texts = {}
    for choice in ("joint", "max", "per_sample"):
        plan = bw.transform(model, SCHEDULE, batch_reduce=choice, example_args=batch([0, 1], [0, 0])).plan
        texts[choice] = str(plan).splitlines()[-1]
        assert plan.to_dict()["samples"] == (None if choice == "joint" else 2)
    assert texts == {
        "joint": "note: one decision for a whole batch: its samples are measured together, and compute and reuse the same steps",
        "max": "note: one decision for a whole batch: its samples compute and reuse the same steps, as the one that changes most needs it",
        "per_sample": "note: each sample of a batch has its own schedule",
    }


class Mixing(OneStream):
    """Normalizes over the batch."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x - x.mean(0, keepdim=True), t)


class Folded(OneStream):
    """Tokens along dimension 0, samples behind them."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, temb = self.patch(x).transpose(0, 1), self.time(t[:1])
        for block in self.blocks:
            x = block(x, temb)
        return self.head(x.transpose(0, 1))


@pytest.mark.parametrize(("kind", "what"), [(Mixing, "does not keep the samples of a batch apart"), (Folded, "the samples of a batch")])
def test_models_that_mix_samples_are_refused(kind: type[OneStream], what: str) -> None:
    cached = bw.transform(kind().eval(), ADAPTIVE)
    with torch.no_grad(), pytest.raises(bw.UnsupportedGraphError, match=what):
        cached(*batch([0, 1], [0, 0]))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"guard": "graph"}, "batch_reduce='per_sample' requires guard='host'"),
        ({"decide": "joint"}, "decides for each sample and decide='joint' once for all contexts"),
        ({"capture": "region"}, "captured by region calls its stacks with whole batches"),
        ({"capture": "opaque"}, "needs the graph, which shows where the samples of a batch are"),
        ({"batch_reduce": "mean"}, "batch_reduce is 'mean'; choose one of 'joint', 'max', 'per_sample'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(model: OneStream, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(bw.ConfigError, match=re.escape(reason)):
        bw.transform(model, **{"num_steps": STEPS, "batch_reduce": "per_sample", **settings})


def test_calls_that_do_not_fit_are_refused(model: OneStream, tmp_path: Any) -> None:
    cached, joint = bw.transform(model, ADAPTIVE), bw.transform(model, num_steps=STEPS)
    inputs = batch([0, 1], [0, 0])
    with torch.no_grad():
        with pytest.raises(bw.ConfigError, match="requires batch_reduce='per_sample'"), joint.cache_context("c", rows=["a", "b"]):
            joint(*inputs)
        with pytest.raises(bw.ConfigError, match="names 1 rows, but the batch of the call holds 2"), cached.cache_context("c", rows=["a"]):
            cached(*inputs)
        for rows, step, reason in (
            (["a", "a"], None, "rows must be different names"),
            ("ab", None, "rows must be a list of names"),
            (["a", "b"], [1], "step_index has 1 entries, but rows names 2 samples"),
            (["a", "b"], "12", "step_index must be a single whole number, got '12'"),
            (["a", "b"], [1, "2"], "step_index must be a single whole number, got '2'"),
            (None, [1, 2], r"single whole number, got \[1, 2\], and rows does not name the samples"),
        ):
            with pytest.raises(bw.ConfigError, match=reason):
                cached.cache_context("c", rows=rows, step_index=step)
        cached(*inputs)
    with pytest.raises(bw.ConfigError, match="the functional form has one state"):
        cached.init_state(inputs)
    with pytest.raises(bw.ConfigError, match="rows require batch_reduce='per_sample', got 'joint'"):
        joint.row_state("0")
    with pytest.raises(bw.StateError, match="there is no group '9'"):
        cached.drop_row("9")
    with pytest.raises(bw.ExportError, match="batch_reduce='per_sample' cannot be exported"):
        bw.export(cached, tmp_path / "bundle")


def test_settings_change_while_it_runs(model: OneStream) -> None:
    cached = bw.transform(model, ADAPTIVE, batch_reduce="joint")
    with torch.no_grad():
        cached(*batch([0, 1], [0, 0]))
        cached.configure(batch_reduce="per_sample")
        for step in range(6):
            outputs = cached(*batch([0, 1], [step] * 2))
    expected, computed = alone(ADAPTIVE, 1, 6)
    close(outputs[1:2], expected[-1])
    assert pattern(cached, "1/default") == computed
    assert cached.report().captures == 2, "for the batch and for one sample alone"


def test_max_decides_alike_inside_the_graph_and_on_the_host(model: OneStream) -> None:
    config = dataclasses.replace(SCHEDULE, batch_reduce="max")
    host, graph = bw.transform(model, config), bw.transform(model, config, guard="graph")
    with torch.no_grad():
        for step in range(12):
            inputs = batch([0, 1, 2], [step] * 3)
            assert torch.equal(host(*inputs), graph(*inputs))
    assert pattern(host, "default") == pattern(graph, "default")
    assert "." in pattern(host, "default")
