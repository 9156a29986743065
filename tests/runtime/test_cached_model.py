"""The drop-in: contexts, generations, changes under way, the report and the functional form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bwcache_compile as bw
from tests.models import OneStream, TwoStream
from tests.runtime.helpers import STATIC, generation, pattern, run


def test_two_interleaved_contexts_equal_each_alone(model: OneStream) -> None:
    cached = bw.transform(model, STATIC)
    alone = {name: generation(cached, model, name=name, shift=shift) for name, shift in (("a", 0), ("b", 3))}
    cached.reset()
    for step in range(6):
        for name, shift in (("a", 0), ("b", 3)):
            with cached.cache_context(name):
                assert torch.equal(run(cached, *model.example(step=step + shift)), alone[name][step])
    assert pattern(cached, "a") == pattern(cached, "b") == "#..#.#"


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
    assert cached.report().warnings == ("default: the weights changed before step 2: the cache was cleared",)


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
        first, after = cached.functional_step(inputs, {}, state)
        again, _ = cached.functional_step(inputs, {}, state)
        assert torch.equal(first, expected[step])
        assert torch.equal(first, again)
        assert all(torch.equal(a, b) for a, b in zip(before, state.slots, strict=True))
        state = after
    assert cached.report().contexts == {}
    with pytest.raises(bw.StateError, match="this state was made for inputs of other shapes or dtypes"):
        cached.functional_step(model.example(batch=2), {}, state)


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
    assert torch.equal(cached.functional_step(model.example(), {}, cached.init_state(model.example()))[0], kept)


def test_it_stands_in_for_the_model(model: OneStream) -> None:
    model.extra = "an attribute of the model"
    cached = bw.transform(model, STATIC)
    assert list(cached.state_dict()) == list(model.state_dict())
    assert [id(p) for p in cached.parameters()] == [id(p) for p in model.parameters()]
    assert cached.extra == "an attribute of the model"
    assert cached.head is model.head
    run(cached, *model.example())
    assert list(cached.state_dict()) == list(model.state_dict()), "programs are no submodules"
    model.register_buffer("table", torch.zeros(2), persistent=False)
    assert list(cached.state_dict()) == list(model.state_dict()), "no buffer that is not persistent"
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
    assert len(cached._programs) == 1, "how an argument is passed is no new signature"


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
        "canonicalize", "hoist_sizes", "arrange_sources", "split_region", "insert_cache", "insert_indicator", "insert_policy",
        "lift_cache_state", "specialize", "whole",
    ]  # fmt: skip
    whole = diffs["whole"]
    assert whole.blocks_guarded == 3
    assert whole.copied_parameters == 0
    assert whole.removed["linear"] == 8, "six in the blocks, and the two that only fed them"
    assert "-linear_2" in whole.text


def test_an_error_in_a_call_frees_the_context(model: OneStream) -> None:
    cached = bw.transform(model, STATIC)
    generation(cached, model, steps=2)
    with pytest.raises(TypeError):
        cached()
    assert not cached._contexts.get("default").lock.locked()
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


class Scribbling(OneStream):
    """Writes to an attribute of its own at each call, and takes calls that draw noise, which cannot be captured."""

    def forward(self, x: Tensor, t: Tensor, branch: bool = False) -> Tensor:  # type: ignore[override]
        self.last = object()
        return super().forward(x + torch.randn_like(x) if branch else x, t)


def test_a_call_that_cannot_be_captured_costs_other_contexts_nothing() -> None:
    model = Scribbling().eval()
    cached = bw.transform(model, STATIC)
    for step in range(2):
        run(cached, *model.example(step=step))
    with cached.cache_context("other"), pytest.raises(bw.CaptureError):
        cached(*model.example(), branch=True)
    run(cached, *model.example(step=2))
    assert (cached.report().captures, cached.report().contexts["default"].reused) == (1, 2)
