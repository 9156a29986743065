"""The drop-in: contexts, generations, changes under way, the report and the functional form."""

from __future__ import annotations

import re
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bwcache_compile as bw
from tests.models import OneStream, TwoStream

STATIC = bw.CacheConfig(policy="static", steps_mask=(0, 1, 1, 0, 1, 0))


@pytest.fixture
def model() -> OneStream:
    return OneStream().eval()


@torch.no_grad()
def run(module: nn.Module, *inputs: Any) -> Any:
    return module(*inputs)


def generation(cached: bw.CachedModel, model: OneStream, steps: int = 6, name: str | None = None, shift: int = 0) -> list[Tensor]:
    outputs = []
    for step in range(steps):
        if name is None:
            outputs.append(run(cached, *model.example(step=step + shift)))
        else:
            with cached.cache_context(name):
                outputs.append(run(cached, *model.example(step=step + shift)))
    return outputs


def pattern(cached: bw.CachedModel, name: str = "default") -> str:
    return "".join("#" if record.computed else "." for record in cached.report().contexts[name].steps)


def test_two_interleaved_contexts_equal_each_alone(model: OneStream) -> None:
    cached = bw.transform(model, STATIC)
    alone = {name: generation(cached, model, name=name, shift=shift) for name, shift in (("a", 0), ("b", 3))}
    cached.reset()
    for step in range(6):
        for name, shift in (("a", 0), ("b", 3)):
            with cached.cache_context(name):
                assert torch.equal(run(cached, *model.example(step=step + shift)), alone[name][step])
    assert pattern(cached, "a") == pattern(cached, "b") == "#..#.#"


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
    cached = bw.transform(model, bw.CacheConfig(threshold=float("inf"), reuse_interval=1.0, tail=0.0))
    for step in range(4):
        with cached.cache_context("cond", num_inference_steps=4, sigma=1.0):
            run(cached, *model.example(step=step))
    assert pattern(cached, "cond") == "##.."


def test_missing_num_steps_fails_at_the_first_call(model: OneStream) -> None:
    with pytest.raises(bw.ConfigError) as caught:
        run(bw.transform(model), *model.example())
    assert str(caught.value) == (
        "num_steps is not known, and policy='schedule' places the protected tail by it. Set CacheConfig(num_steps=...),"
        " call cached.reset(num_steps=...), or pass num_inference_steps to cache_context."
    )


def test_what_a_context_says_must_fit(model: OneStream) -> None:
    cached = bw.transform(model, STATIC)
    message = "steps_mask has 6 entries but num_inference_steps is 4; they must be equal."
    with cached.cache_context("cond", num_inference_steps=4), pytest.raises(bw.ConfigError, match=message):
        run(cached, *model.example())
    message = r"step_index 6 is outside the 6 steps of a generation \(0 .. 5\)."
    with cached.cache_context("cond", step_index=6), pytest.raises(bw.StateError, match=message):
        run(cached, *model.example())


def test_two_calls_a_step_are_noticed(model: OneStream) -> None:
    cached = bw.transform(model, bw.CacheConfig(num_steps=4, threshold=0))
    x, t = model.example()
    run(cached, x, t)
    with pytest.raises(bw.StateError) as caught:
        run(cached, x + 1, t)
    assert str(caught.value) == (
        "two calls in a row have the same timestep: the model is called more than once a step, and the calls would"
        " overwrite one another's cache. Wrap each in `with cached.cache_context(name):`, or set CacheConfig(calls_per_step=2)."
        " If the first call was of a run that was broken off, call cached.reset()."
    )


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


def test_loaded_weights_clear_the_cache_but_keep_the_step(model: OneStream) -> None:
    cached = bw.transform(model, STATIC)
    generation(cached, model, steps=2)
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()})
    x, t = model.example(step=2)
    assert torch.equal(run(cached, x, t), run(model, x, t)), "step 2 would have reused a stale cache"
    assert pattern(cached) == "#.#"
    assert cached.report().warnings == ("default: the weights changed before step 2: the cache was cleared",)


def test_a_replaced_module_is_captured_again(model: OneStream) -> None:
    cached = bw.transform(model, STATIC)
    generation(cached, model, steps=2)
    model.head = nn.Linear(8, 4)
    x, t = model.example(step=2)
    assert torch.equal(run(cached, x, t), run(model, x, t))
    assert cached.report().warnings == ("default: the modules changed (head) before step 2: the cache was cleared",)
    assert cached.report().captures == 2


def test_invalidate_is_for_edits_that_nothing_counts(model: OneStream) -> None:
    cached = bw.transform(model, STATIC)
    generation(cached, model, steps=2)
    for parameter in model.parameters():
        parameter.data *= 1.1
    cached.invalidate()
    x, t = model.example(step=2)
    assert torch.equal(run(cached, x, t), run(model, x, t))
    assert cached.report().warnings == ("default: invalidated before step 2: the cache was cleared",)


def test_a_run_without_reuse_says_which_threshold_would_do(model: OneStream) -> None:
    cached = bw.transform(model, bw.CacheConfig.paper(num_steps=4, threshold=1e-6, tail=0.0))
    with pytest.warns(bw.CacheWarning, match="no step of context 'default' was reused at threshold 1e-06") as caught:
        generation(cached, model, steps=4)
    smallest = cached.report().contexts["default"].smallest()
    assert smallest is not None
    assert f"the smallest indicator was {smallest.indicator:.4g} at step {smallest.step};" in str(caught[0].message)
    cached.configure(threshold=(smallest.indicator or 0) * 1.01)
    generation(cached, model, steps=4)
    assert cached.report().contexts["default"].reused > 0


def test_changed_settings_take_effect_without_a_capture(model: OneStream) -> None:
    cached = bw.transform(model, bw.CacheConfig(num_steps=4, threshold=0, tail=0.0, reuse_interval=3))
    generation(cached, model, steps=4)
    program = cached.program
    cached.configure(threshold=float("inf"))
    generation(cached, model, steps=4)
    assert pattern(cached) == "##.."
    cached.reset(num_steps=6)
    generation(cached, model, steps=6)
    assert pattern(cached) == "##...#"
    assert cached.program is program
    with pytest.raises(bw.ConfigError, match="reuse shapes the graphs; transform the model again"):
        cached.configure(reuse="residual")


def test_report_keeps_the_indicator_with_its_gap(model: OneStream) -> None:
    cached = bw.transform(model, bw.CacheConfig.paper(num_steps=6, threshold=float("inf"), reuse_interval=2, tail=0.0))
    generation(cached, model)
    report = cached.report()
    steps = report.contexts["default"].steps
    assert report.blocks == ("blocks.0", "blocks.1", "blocks.2")
    assert [(r.step, r.computed, r.gap) for r in steps] == [
        (0, True, None), (1, True, 1), (2, False, None), (3, False, None), (4, True, 3), (5, False, None),
    ]  # fmt: skip
    assert steps[4].change is not None
    assert steps[4].change.shape == (3,)
    assert steps[4].indicator == pytest.approx(float(steps[4].change.mean()))
    assert str(report) == "default: 3 computed, 3 reused  ##..#."


def test_the_functional_step_leaves_its_state_alone(model: OneStream) -> None:
    cached = bw.transform(model, STATIC)
    expected = generation(cached, model)
    cached.reset()
    state = cached.init_state(model.example())
    for step in range(6):
        inputs = model.example(step=step)
        before = [slot.clone() for slot in state.slots]
        first, after = cached.step(inputs, {}, state)
        again, _ = cached.step(inputs, {}, state)
        assert torch.equal(first, expected[step])
        assert torch.equal(first, again)
        assert all(torch.equal(a, b) for a, b in zip(before, state.slots, strict=True))
        state = after
    assert cached.report().contexts == {}
    with pytest.raises(bw.StateError, match="this state belongs to inputs of other shapes or dtypes"):
        cached.step(model.example(batch=2), {}, state)


def test_what_the_caller_does_with_an_output_does_not_reach_the_cache() -> None:
    class Bare(OneStream):
        """Returns the last block's output itself."""

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            x, temb = self.patch(x), self.embed(t)
            for block in self.blocks:
                x = block(x, temb)
            return x

    model = Bare().eval()
    cached = bw.transform(model, STATIC)
    kept = run(cached, *model.example()).clone()
    cached.reset()
    run(cached, *model.example()).zero_()
    assert torch.equal(run(cached, *model.example(step=1)), kept)
    run(cached, *model.example(step=2)).zero_()
    assert torch.equal(cached.step(model.example(), {}, cached.init_state(model.example()))[0], kept)


def test_it_stands_in_for_the_model(model: OneStream) -> None:
    model.extra = "an attribute of the model"
    cached = bw.transform(model, STATIC)
    assert list(cached.state_dict()) == list(model.state_dict())
    assert [id(p) for p in cached.parameters()] == [id(p) for p in model.parameters()]
    assert cached.extra == "an attribute of the model"
    assert cached.head is model.head
    run(cached, *model.example())
    assert list(cached.state_dict()) == list(model.state_dict()), "programs are no submodules"
    cached.double()
    assert model.head.weight.dtype == torch.float64
    x, t = model.example()
    assert torch.equal(run(cached, x.double(), t.double()), run(model, x.double(), t.double()))


def test_several_streams_and_positional_or_named_arguments() -> None:
    model = TwoStream().eval()
    cached = bw.transform(model, bw.CacheConfig(num_steps=4, threshold=0))
    x, text, t = model.example()
    expected = run(model, x, text, t)
    assert torch.equal(run(cached, x, text, t), expected)
    cached.reset()
    with torch.no_grad():
        assert torch.equal(cached(t=t, x=x, text=text), expected)
        cached.reset()
        assert torch.equal(cached(text=text, x=x, t=t), expected)
    assert len(cached._programs) == 2, "the order of keywords is no new signature"


class OurNames(OneStream):
    """Inputs, and a submodule, under names that the passes use for their own."""

    def __init__(self) -> None:
        super().__init__()
        self.region = nn.Linear(4, 4)

    def forward(self, cache_in_output_0: Tensor, step: Tensor, policy_mask: Tensor) -> Tensor:
        return super().forward(self.region(cache_in_output_0 + policy_mask), step)


def test_a_models_own_names_are_never_taken() -> None:
    model = OurNames().eval()
    cached = bw.transform(model, bw.CacheConfig(policy="static", steps_mask=(0, 1, 0), reuse="taylor"))
    for at in range(3):
        x, t = model.example(step=at)
        expected, actual = run(model, x, t, x * 2), run(cached, x, t, x * 2)
        assert torch.equal(actual, expected) == (at != 1)
    assert pattern(cached) == "#.#"


def test_graph_diff_shows_each_pass_and_the_whole(model: OneStream) -> None:
    cached = bw.transform(model, bw.CacheConfig(num_steps=4), example_args=model.example())
    diffs = cached.graph_diff()
    assert list(diffs) == [
        "canonicalize", "hoist_sizes", "split_region", "insert_cache", "insert_indicator", "insert_policy", "lift_cache_state",
        "specialize", "whole",
    ]  # fmt: skip
    whole = diffs["whole"]
    assert whole.blocks_guarded == 3
    assert whole.copied_parameters == 0
    assert whole.removed["linear"] == 8, "six in the blocks, and the two that only fed them"
    assert "-linear_2" in whole.text


REFUSALS: list[tuple[Any, type[Exception], str]] = [
    (lambda m: bw.transform(bw.transform(m)), bw.StateError, "this model is transformed already; use it as it is, or"),
    (lambda m: bw.transform(torch.compile(m)), bw.ConfigError, "this model is compiled already: transform the original first, then call"),
    (lambda m: bw.transform(len), bw.ConfigError, "transform takes a torch.nn.Module, not a builtin_function_or_method."),
    (
        lambda m: bw.transform(OneStream().to("meta")),
        bw.ConfigError,
        "the parameter patch.weight of OneStream has no data here (device meta)",
    ),
    (lambda m: run(bw.transform(m.train(), STATIC), *m.example()), bw.StateError, "OneStream is in training mode; call .eval() first"),
    (lambda m: closed(m), bw.StateError, "this cached model was closed; transform the model again."),
    (lambda m: bw.transform(m).plan, bw.StateError, "nothing is captured yet: call the model once, or pass example_args"),
    (lambda m: run(bw.transform(m, STATIC), m.example(), object()), bw.ConfigError, "an input is a object; a program is chosen by tensors"),
    (lambda m: bw.transform(m, STATIC)(m.example()[0].requires_grad_(), m.example()[1]), bw.StateError, "an input requires gradients, and"),
    (
        lambda m: bw.transform(m, bw.CacheConfig(num_steps=4, compute_first=2, compute_last=1), example_args=m.example()),
        bw.ConfigError,
        "compute_first=2 and compute_last=1 leave none of the 3 blocks of OneStream to cache.",
    ),
]


def closed(model: OneStream) -> None:
    cached = bw.transform(model, STATIC, example_args=model.example())
    cached.close()
    run(cached, *model.example())


@pytest.mark.parametrize(("action", "kind", "message"), REFUSALS, ids=[message[:40] for _, _, message in REFUSALS])
def test_refusals(model: OneStream, action: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}"):
        action(model)


def test_one_context_entered_by_two_threads_raises(model: OneStream) -> None:
    cached = bw.transform(model, STATIC, example_args=model.example())
    generation(cached, model, steps=1)
    context = cached._contexts["default"]
    errors: list[str] = []

    def call() -> None:
        try:
            run(cached, *model.example(step=1))
        except bw.StateError as error:
            errors.append(str(error))

    with context.lock:  # as it is while the other thread is inside
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert errors == [
        "the context 'default' is in use by another thread. Give each stream of calls its own: `with cached.cache_context(name):`."
    ]


def test_an_error_in_a_call_frees_the_context(model: OneStream) -> None:
    cached = bw.transform(model, STATIC)
    generation(cached, model, steps=2)
    with pytest.raises(TypeError):
        cached()
    assert not cached._contexts["default"].lock.locked()
    run(cached, *model.example(step=2))
    assert pattern(cached) == "#.."


def test_compute_first_and_last_stay_outside_the_region(model: OneStream) -> None:
    config = bw.CacheConfig(policy="static", steps_mask=(0, 1), compute_first=1, compute_last=1)
    cached = bw.transform(model, config)
    generation(cached, model, steps=1)
    assert [block.name for block in cached.plan.blocks] == ["blocks.1"]
    x, t = model.example(step=1)
    with torch.no_grad():
        x0, temb0 = model.patch(model.example()[0]), model.embed(model.example()[1])
        kept = model.blocks[1](model.blocks[0](x0, temb0), temb0)
        expected = model.head(model.blocks[2](kept, model.embed(t)))
    torch.testing.assert_close(run(cached, x, t), expected, rtol=1e-6, atol=1e-6)
