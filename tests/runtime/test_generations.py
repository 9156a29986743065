"""Where a generation begins: by the count, the step, the inputs, the time, or a reset."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bwcache_compile as bw
from bwcache_compile import context_store
from tests.models import OneStream
from tests.runtime.helpers import STATIC, generation, pattern, run


def test_a_generation_begins_when_the_steps_are_through(model: OneStream) -> None:
    cached = bw.transform(model, STATIC)
    first = generation(cached, model)
    assert all(torch.equal(a, b) for a, b in zip(first, generation(cached, model), strict=True))
    assert pattern(cached) == "#..#.#"


def test_reset_begins_a_generation_early(model: OneStream) -> None:
    cached = bw.transform(model, STATIC)
    generation(cached, model, steps=2)
    cached.reset()
    assert cached.report().contexts == {}
    generation(cached, model, steps=3)
    assert pattern(cached) == "#.."


def test_the_step_index_counts_where_it_is_given(model: OneStream) -> None:
    cached = bw.transform(model, STATIC)
    for step in (0, 3, 4, 5):  # guidance was off at steps 1 and 2
        with cached.cache_context("uncond", step_index=step):
            run(cached, *model.example(step=step))
    steps = cached.report().contexts["uncond"].steps
    assert [(record.step, record.computed, record.gap) for record in steps] == [
        (0, True, None),
        (3, True, 3),
        (4, False, None),
        (5, True, 2),
    ]
    with cached.cache_context("uncond", step_index=0):
        run(cached, *model.example(step=0))
    assert [record.step for record in cached.report().contexts["uncond"].steps] == [0], "going back begins a generation"


def test_a_context_that_joins_late_starts_cold(model: OneStream) -> None:
    cached = bw.transform(model, bw.CacheConfig(num_steps=8, threshold=float("inf"), reuse_interval=7, tail=0.0))
    for step in range(4, 8):
        with cached.cache_context("late", step_index=step):
            run(cached, *model.example(step=step))
    report = cached.report().contexts["late"]
    assert pattern(cached, "late") == "##.."
    assert report.steps[0].indicator is None, "there is nothing to compare the first step with"


def test_num_steps_comes_from_the_context_too(model: OneStream) -> None:
    cached = bw.transform(model, bw.CacheConfig(threshold=float("inf"), reuse_fraction=1.0, tail=0.0))
    for step in range(4):
        with cached.cache_context("cond", num_inference_steps=4, sigma=1.0):
            run(cached, *model.example(step=step))
    assert pattern(cached, "cond") == "##.."


@pytest.mark.parametrize("reuse", ["output", "taylor"])
def test_a_reused_step_need_not_know_the_number_of_steps(model: OneStream, reuse: str) -> None:
    """It takes nothing of what decides; the number was known where it was decided."""
    cached = bw.transform(model, bw.CacheConfig(threshold=float("inf"), reuse_interval=2, tail=0.0, reuse=reuse))
    for step in range(4):
        with cached.cache_context("cond", num_inference_steps=6 if step < 2 else None):
            run(cached, *model.example(step=step))
    assert pattern(cached, "cond") == "##.."


def test_missing_num_steps_fails_at_the_first_call(model: OneStream) -> None:
    with pytest.raises(bw.ConfigError) as caught:
        run(bw.transform(model, bw.CacheConfig()), *model.example())
    assert str(caught.value) == (
        "policy='schedule' needs the number of steps. Set CacheConfig(num_steps=...), call "
        "cached.reset(num_steps=...), or pass num_inference_steps to cache_context."
    )


def test_what_a_context_says_must_fit(model: OneStream) -> None:
    cached = bw.transform(model, STATIC)
    message = "steps_mask has 6 entries but num_inference_steps is 4; they must be equal."
    with cached.cache_context("cond", num_inference_steps=4), pytest.raises(bw.ConfigError, match=message):
        run(cached, *model.example())
    message = r"step_index must be from 0 to 5, got 6: this generation has 6 steps\."
    with cached.cache_context("cond", step_index=6), pytest.raises(bw.StateError, match=message):
        run(cached, *model.example())


@pytest.mark.parametrize("capture", ["whole", "region", "opaque"])
@pytest.mark.parametrize("value", ["3", 2.5, 1j, float("nan"), object(), torch.ones(2, dtype=torch.int64)])
def test_a_step_is_a_whole_number(model: OneStream, capture: Any, value: Any) -> None:
    cached: Any = bw.transform(model, STATIC, capture=capture)
    for name in ("step_index", "num_inference_steps"):
        with pytest.raises(bw.ConfigError) as caught:
            cached.cache_context("cond", **{name: value})
        assert str(caught.value) == f"{name} must be a single whole number, got {value!r}."


def test_a_step_may_be_any_whole_number(model: OneStream) -> None:
    cached = bw.transform(model, STATIC)
    for step, value in enumerate((0, torch.tensor(1), np.int64(2))):
        with cached.cache_context("cond", step_index=value):  # type: ignore[arg-type]
            run(cached, *model.example(step=step))
    assert [record.step for record in cached.report().contexts["cond"].steps] == [0, 1, 2]


def test_two_calls_a_step_are_noticed(model: OneStream) -> None:
    cached = bw.transform(model, bw.CacheConfig(num_steps=4, threshold=0))
    x, t = model.example()
    run(cached, x, t)
    with pytest.raises(bw.StateError) as caught:
        run(cached, x + 1, t)
    assert str(caught.value) == (
        "two consecutive calls have the same timestep: the model is called more than once per step, and the calls "
        "would overwrite one another's cache. Wrap each in `with cached.cache_context(name):`, or set "
        "CacheConfig(calls_per_step=2). If the first call belonged to an interrupted run, call cached.reset()."
    )


class Conditioned(OneStream):
    """Takes what prompts differ in beside the time: embeddings of rank 2, and their mask."""

    def forward(self, x: Tensor, t: Tensor, pooled: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x + (pooled * mask).mean(), t)


def prompts() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    drawn = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(0))
    return (drawn[0], torch.ones(1, 6)), (drawn[1], torch.tensor([[1.0, 1, 1, 0, 0, 0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_prompts_a_step_are_noticed(dtype: torch.dtype) -> None:
    model = Conditioned().eval()
    cached = bw.transform(model, STATIC)
    (pooled, mask), (other, other_mask) = prompts()
    run(cached, *model.example(), pooled.to(dtype), mask)
    with pytest.raises(bw.StateError, match=r"^two consecutive calls have the same timestep"):
        run(cached, *model.example(), other.to(dtype), other_mask)


def test_the_time_is_told_from_what_else_changes() -> None:
    model = Conditioned().eval()
    cached = bw.transform(model, STATIC)
    (pooled, mask), (other, _) = prompts()
    for step in (0, 1, 2, 0, 1):
        run(cached, *model.example(step=step), torch.lerp(pooled, other, step / 4), mask)
    assert pattern(cached) == "#."


def test_a_time_that_is_embedded_already_is_no_second_prompt() -> None:
    class Embedded(OneStream):
        def forward(self, x: Tensor, embedded: Tensor, mask: Tensor) -> Tensor:
            return super().forward(x, (embedded * mask).mean(1))

    model = Embedded().eval()
    cached = bw.transform(model, STATIC)
    (embedded, _), (other, mask) = prompts()
    for step in range(3):
        run(cached, model.example(step=step)[0], torch.lerp(embedded, other, step / 4), mask)
    assert pattern(cached) == "#.."


def test_calls_per_step_gives_each_call_its_context(model: OneStream) -> None:
    cached = bw.transform(model, bw.CacheConfig(policy="static", steps_mask=(0, 1, 0), calls_per_step=2))
    for step in range(3):
        x, t = model.example(step=step)
        run(cached, x, t)
        run(cached, x + 1, t)
    assert (pattern(cached, "call_0"), pattern(cached, "call_1")) == ("#.#", "#.#")


def test_another_shape_begins_a_generation(model: OneStream) -> None:
    cached = bw.transform(model, STATIC)
    generation(cached, model, steps=2)
    x, t = model.example(batch=2, step=2)
    assert torch.equal(run(cached, x, t), run(model, x, t))
    assert cached.report().warnings == ("default: the inputs changed before step 2: a new generation began",)


@pytest.mark.parametrize("name", [None, "default"])
def test_a_run_that_was_broken_off_is_noticed_by_its_time(model: OneStream, name: str | None) -> None:
    cached = bw.transform(model, STATIC)
    whole = generation(cached, model, name=name)
    generation(cached, model, steps=2, name=name)
    assert all(torch.equal(a, b) for a, b in zip(whole, generation(cached, model, name=name), strict=True))
    assert pattern(cached) == "#..#.#"
    assert cached.report().warnings == ("default: the timestep went back before step 2: a new generation began",)


def test_time_may_rise(model: OneStream) -> None:
    cached = bw.transform(model, STATIC)
    for step in (5, 3, 1, 5, 3):  # the example's time falls with the step
        run(cached, *model.example(step=step))
    assert pattern(cached) == "#."


def test_a_named_run_broken_off_after_its_first_step(model: OneStream) -> None:
    cached = bw.transform(model, STATIC)
    generation(cached, model, steps=1, name="default")
    generation(cached, model, steps=2, name="default")
    assert pattern(cached) == "#.", "a name of the caller's is no sign of calls that are not told apart, whatever it is"


def timed(dtype: torch.dtype, step: int) -> tuple[Tensor, Tensor]:
    """Return the example of a step, whose time falls from 1000 in eighths, in the dtype of a pipeline."""
    x, _ = OneStream.example(OneStream(), step=step)
    return x, torch.full((1,), 1000 - 125 * step).to(dtype)


class Timed(OneStream):
    """Takes times of any dtype."""

    def embed(self, t: Tensor) -> Tensor:
        return super().embed(t.float() / 1000)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [None, "cond"])
@pytest.mark.parametrize("broken_off", [2, pytest.param(3, marks=pytest.mark.slow), 5])
def test_a_time_against_the_run_is_proof_in_any_dtype(dtype: torch.dtype, name: str | None, broken_off: int) -> None:
    model = Timed().eval()
    cached = bw.transform(model, STATIC)

    def call(step: int, shift: int) -> Tensor:
        x, t = timed(dtype, step)
        if name is None:
            return run(cached, x + shift, t)
        with cached.cache_context(name):
            return run(cached, x + shift, t)

    whole = [call(step, 3) for step in range(6)]
    for step in range(broken_off):
        call(step, 0)
    assert all(torch.equal(call(step, 3), whole[step]) for step in range(6)), "the first video is in the second"
    assert cached.report().warnings == (f"{name or 'default'}: the timestep went back before step {broken_off}: a new generation began",)


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_that_are_shorter_than_num_steps(dtype: torch.dtype) -> None:
    model = Timed().eval()
    cached = bw.transform(model, STATIC)
    first = [run(cached, *timed(dtype, step)) for step in range(5)]
    assert pattern(cached) == "#..#."
    x, t = timed(dtype, 0)
    assert torch.equal(run(cached, x + 1, t), run(model, x + 1, t))
    for step in range(1, 5):
        run(cached, *timed(dtype, step))
    assert all(torch.equal(run(cached, *timed(dtype, step)), first[step]) for step in range(5))


@pytest.mark.parametrize(("name", "expected"), [(None, "###.#"), ("cond", "##..#")])
def test_equal_neighbors_in_half_precision_are_computed(name: str | None, expected: str) -> None:
    """A second call with the same rounded time may be the first of another run, or a second one of the same step."""
    model = Timed().eval()
    cached = bw.transform(model, bw.CacheConfig(policy="static", steps_mask=(0, 1, 1, 1, 0, 1)))
    outputs = []
    for step, time in enumerate((1000.0, 999.0, 980.0, 960.0, 940.0)):  # the first two are one number in bfloat16
        t = torch.full((1,), time, dtype=torch.bfloat16)
        x, _ = model.example(step=step)
        if name is None:
            outputs.append((run(cached, x, t), run(model, x, t)))
        else:
            with cached.cache_context(name):
                outputs.append((run(cached, x, t), run(model, x, t)))
    assert pattern(cached, name or "default") == expected
    assert torch.equal(*outputs[1])
    (event,) = cached.report().warnings[:1]
    assert "the timestep repeats in half precision" in event


def test_two_unnamed_calls_a_step_in_half_precision_never_share_a_cache() -> None:
    model = Timed().eval()
    cached = bw.transform(model, STATIC)
    for step in range(3):
        x, t = timed(torch.bfloat16, step)
        for shift in (0, 5):
            assert torch.equal(run(cached, x + shift, t), run(model, x + shift, t)), "nothing tells the two calls of a step apart"


def test_the_time_may_change_its_dtype_within_a_run() -> None:
    """Schedulers may cast the latents after the first step, and pipelines the timestep with them."""
    model = Timed().eval()
    cached = bw.transform(model, STATIC)
    for step in range(6):
        run(cached, *timed(torch.float32 if step == 0 else torch.bfloat16, step))
    assert pattern(cached) == "#..#.#"
    assert cached.report().warnings == ()
    assert cached.report().captures == 2


def test_a_first_call_that_fails_leaves_the_clock_as_it_was(model: OneStream) -> None:
    cached = bw.transform(model, STATIC, example_args=model.example())
    graphs = cached._programs.latest.graphs
    original = graphs["compute"]

    def failing(*operands: object) -> None:
        raise MemoryError

    for _ in range(2):
        graphs["compute"] = failing
        with pytest.raises(MemoryError):
            run(cached, *model.example())
    graphs["compute"] = original
    for step in (0, 1, 0, 1):
        run(cached, *model.example(step=step))
    assert pattern(cached) == "#.", "the second run began anew"


def test_only_calls_that_succeed_are_counted(model: OneStream) -> None:
    config = bw.CacheConfig(policy="static", steps_mask=(0, 1, 0), calls_per_step=2)
    whole, cached = bw.transform(model, config, example_args=model.example()), bw.transform(model, config, example_args=model.example())
    graphs = cached._programs.latest.graphs
    original = graphs["reuse"]

    def failing(*operands: object) -> None:
        raise MemoryError

    for step in range(3):
        for shift in (0, 4):
            x, t = model.example(step=step)
            if (step, shift) == (1, 0):
                graphs["reuse"] = failing
                with pytest.raises(MemoryError):
                    run(cached, x + shift, t)
                graphs["reuse"] = original
            assert torch.equal(run(cached, x + shift, t), run(whole, x + shift, t)), "the two calls of a step exchanged their caches"


def test_more_steps_than_num_steps_are_said(model: OneStream) -> None:
    cached = bw.transform(model, bw.CacheConfig(num_steps=2, threshold=0))
    for step in range(3):
        run(cached, *model.example(step=step))
    assert cached.report().warnings == (
        "default: the timestep continued after the last of 2 steps: a new generation began. Set num_steps to the number of steps",
    )
    assert cached.report().contexts["default"].began == "the 2 steps of the previous generation were complete"


def test_a_context_that_joins_another_run_late_drops_what_it_held(model: OneStream) -> None:
    """Guidance that begins late: the unconditional context's cache may be of the video before, which was broken off."""
    cached = bw.transform(model, bw.CacheConfig(policy="static", steps_mask=(0, 1, 1, 1, 1, 1, 1, 1)))

    def call(name: str, step: int, shift: int) -> Tensor:
        x, t = model.example(step=step)
        with cached.cache_context(name):
            return run(cached, x + shift, t)

    for step in range(3):
        call("cond", step, 0)
        call("uncond", step, 0)
    for step in range(4):  # another video: no guidance before step 3
        call("cond", step, 5)
    x, t = model.example(step=3)
    assert torch.equal(call("uncond", 3, 5), run(model, x + 5, t)), "the first video is in the second"
    assert cached.report().warnings == (
        "cond: the timestep went back before step 3: a new generation began",
        "uncond: another context of the group began a new run before step 3: the cache was cleared",
    )


def test_contexts_of_two_groups_share_nothing(model: OneStream) -> None:
    cached = bw.transform(model, STATIC)
    alone = {shift: [] for shift in (0, 5)}
    for shift, outputs in alone.items():
        for step in range(6):
            x, t = model.example(step=step)
            outputs.append(run(cached, x + shift, t))
        cached.reset()
    for step in range(6):
        x, t = model.example(step=step)
        for shift in (0, 5):
            with cached.cache_context("cond", group=f"video {shift}"):
                assert torch.equal(run(cached, x + shift, t), alone[shift][step])
    assert list(cached.report().contexts) == ["video 0/cond", "video 5/cond"]


def test_a_generation_frees_its_tensors_at_its_last_step(model: OneStream) -> None:
    cached = bw.transform(model, STATIC)
    generation(cached, model, steps=5)
    context = cached._contexts.get("default")
    assert context is not None
    assert context.state is not None
    slot = weakref.ref(context.state.slots[0])
    held = context.state.bytes
    x, t = model.example(step=5)
    run(cached, x, t)
    gc.collect()
    assert slot() is None
    assert (context.state, context.match) == (None, None)
    assert cached.report().contexts["default"].state_bytes == held


def test_contexts_are_bounded(model: OneStream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context_store, "MAX_CONTEXTS", 3)
    cached = bw.transform(model, STATIC)
    for name in "abcdabcd":
        with cached.cache_context(name, group=name):
            run(cached, *model.example())
    assert list(cached.report().contexts) == ["b/b", "c/c", "d/d"]


def test_the_time_is_not_asked_where_the_step_is_given(model: OneStream) -> None:
    cached = bw.transform(model, STATIC)
    for index, step in enumerate((0, 1, 0)):
        with cached.cache_context("default", step_index=index):
            run(cached, *model.example(step=step))
    assert pattern(cached) == "#.."


def test_a_pipeline_may_write_the_next_time_into_the_same_tensor(model: OneStream) -> None:
    cached = bw.transform(model, STATIC)
    time = torch.ones(1)
    for step in (0, 1, 2, 0, 1):
        x, t = model.example(step=step)
        run(cached, x, time.copy_(t))
    assert pattern(cached) == "#."


def test_two_calls_of_one_step_in_one_context_are_reported(model: OneStream) -> None:
    cached = bw.transform(model, STATIC)
    for step in (0, 0, 1, 1):
        with cached.cache_context("both", step_index=step):
            run(cached, *model.example(step=step))
    assert cached.report().warnings == (
        "both: step 1 was repeated: a new generation began. If a step makes several calls, give each its own context",
    )
