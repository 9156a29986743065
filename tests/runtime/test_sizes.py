"""Sizes that change in the middle of a service's life: opened when they do, bounded, never wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

import bwcache_compile as bw
from bwcache_compile import passes
from bwcache_compile.capture.capture import capture
from bwcache_compile.ir.program import ModelProgram
from bwcache_compile.runtime import Toolchain, programs
from tests.models import InPlace, Interleaved, OneStream, TwoStream, noise
from tests.runtime.helpers import run

OFF = bw.CacheConfig(threshold=0, num_steps=4)
STATIC = bw.CacheConfig(policy="static", steps_mask=(0, 1, 1, 0, 1, 0))


def one(batch: int, tokens: int, step: int = 0) -> tuple[Tensor, Tensor]:
    return noise("x", step, batch, tokens, 4), torch.full((batch,), 1 - step / 8)


def two(batch: int, tokens: int, words: int, step: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    x, t = one(batch, tokens, step)
    return x, noise("text", 0, batch, words, 5), t


def check(cached: bw.CachedModel, model: nn.Module, *inputs: Any) -> None:
    cached.reset()
    assert torch.equal(run(cached, *inputs), run(model, *inputs)), [tuple(i.shape) for i in inputs]


def counts(cached: bw.CachedModel) -> tuple[int, int]:
    """How often the model was captured, and how many programs are kept."""
    return cached.report().captures, len(cached._programs)


def test_the_second_signature_opens_the_sizes() -> None:
    model = TwoStream().eval()
    cached = bw.transform(model, OFF)
    check(cached, model, *two(2, 6, 3))
    assert counts(cached) == (1, 1)
    assert cached.program.signature.sizes is None
    check(cached, model, *two(2, 6, 5))
    assert counts(cached) == (2, 1), "the program of dynamic sizes took the first one's place"
    for sizes in ((2, 6, 3), (3, 6, 3), (2, 9, 4), (5, 7, 2), (2, 32, 8)):
        check(cached, model, *two(*sizes))
    assert counts(cached) == (2, 1)
    shapes = {slot.name: slot.shape for slot in cached.plan.slots}
    assert shapes["output_0"] == ("s13", "s12 + s27", 8), "text and video joined"
    assert shapes["reference_0"] == shapes["reference_3"] == ("max(1, (s13*s27) // 32)", 8), "of the video alone"
    assert "note: sizes are dynamic; bytes are given for s12 = 5, s13 = 2, s27 = 6" in str(cached.plan)


def test_a_size_that_cannot_be_opened_has_programs_of_its_own() -> None:
    """An exporter fixes sizes of 1: what broadcasts is another graph."""
    model = TwoStream().eval()
    cached = bw.transform(model, OFF)
    for sizes, expected in (((1, 6, 3), (1, 1)), ((2, 6, 3), (2, 2)), ((3, 8, 4), (2, 2)), ((1, 8, 3), (3, 2)), ((1, 9, 5), (3, 2))):
        check(cached, model, *two(*sizes))
        assert counts(cached) == expected, sizes
    assert cached.plan.notes[-2:] == (
        "dimension 0 of text is fixed at 1: other values are captured separately",
        "dimension 0 of t is fixed at 1: other values are captured separately",
    )


def test_a_context_keeps_its_program_while_another_opens_the_sizes() -> None:
    """As guidance does: two prompts of different lengths, called in turn from the first step on."""
    model = TwoStream().eval()
    cached = bw.transform(model, STATIC)
    alone = {}
    for words in (3, 5):
        single = bw.transform(model, STATIC)
        alone[words] = [run(single, *two(2, 6, words, step)) for step in range(6)]
    for _ in range(2):
        for step in range(6):
            for words in (3, 5):
                with cached.cache_context(f"prompt of {words}"):
                    assert torch.equal(run(cached, *two(2, 6, words, step)), alone[words][step])
    assert cached.report().warnings == ()
    assert counts(cached) == (2, 1)


def test_a_size_change_within_one_program_begins_a_generation() -> None:
    model = OneStream().eval()
    cached = bw.transform(model, STATIC, dynamic_shapes="auto")
    for step in range(2):
        run(cached, *one(2, 6, step))
    x, t = one(2, 9, 2)
    assert torch.equal(run(cached, x, t), run(model, x, t))
    assert cached.report().warnings == ("default: the inputs changed before step 2: a new generation began",)
    assert counts(cached) == (1, 1)
    assert cached.report().contexts["default"].state_bytes == 2 * 9 * 8 * 4


def test_a_state_of_another_size_is_refused() -> None:
    model = OneStream().eval()
    cached = bw.transform(model, STATIC, dynamic_shapes="auto")
    state = cached.init_state(one(2, 6))
    _, state = cached.functional_step(one(2, 6), {}, state)
    other = cached.init_state(one(3, 7))
    assert [tuple(slot.shape) for slot in other.slots] == [(3, 7, 8)]
    with pytest.raises(bw.StateError, match="this state was made for inputs of other shapes or dtypes"):
        cached.functional_step(one(3, 7), {}, state)


class CountsInPython(OneStream):
    """A Python loop over the tokens: tracing it fixes their number."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(torch.stack([x[:, i] * (i + 1) for i in range(x.shape[1])], 1), t)


def test_a_size_that_python_counts_has_a_program_for_each_value() -> None:
    model = CountsInPython().eval()
    cached = bw.transform(model, OFF)
    for tokens in (3, 4, 5):
        check(cached, model, *one(2, tokens))
    assert counts(cached) == (3, 3)
    assert cached.plan.notes[-1] == "dimension 1 of x is fixed at 5: other values are captured separately"
    check(cached, model, *one(3, 4))
    assert counts(cached) == (3, 3), "the batch is open all the same"


@pytest.mark.slow
def test_programs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "MAX_PROGRAMS", 3)
    model = CountsInPython().eval()
    cached = bw.transform(model, OFF)
    for tokens in (2, 3, 4, 2, 5):
        check(cached, model, *one(2, tokens))
    assert counts(cached) == (4, 3)
    check(cached, model, *one(2, 2))
    assert counts(cached) == (4, 3), "used since, so it stayed"
    check(cached, model, *one(2, 3))
    assert counts(cached) == (5, 3), "the least recently used went"


def test_a_model_that_takes_no_open_sizes_is_captured_for_each() -> None:
    def fixed(model: nn.Module, args: Any, kwargs: Any, shapes: Any, reading: bool, **_: Any) -> ModelProgram:
        if shapes is not None:
            raise bw.CaptureError("could not capture OneStream as one graph.\n  non-strict: no size may be open")
        return capture(model, args, kwargs)

    model = OneStream().eval()
    cached = bw.CachedModel(model, OFF, Toolchain(capture=fixed, build=passes.build, explain=passes.explain))
    for tokens in (3, 4, 3, 5):
        check(cached, model, *one(2, tokens))
    assert counts(cached) == (3, 3)
    assert cached.plan.notes[-1] == (
        "each size is captured separately: could not capture OneStream as one graph. non-strict: no size may be open"
    )
    asked = bw.CachedModel(model, OFF, Toolchain(capture=fixed, build=passes.build, explain=passes.explain), "auto")
    with pytest.raises(bw.CaptureError, match="no size may be open"):
        asked.prepare(one(2, 6))


class WrongElsewhere(OneStream):
    """Traces into a graph that is right at six tokens alone."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out = super().forward(x, t)
        return out + (x.shape[1] - 6) if isinstance(x.shape[1], torch.SymInt) else out


def test_a_graph_that_is_wrong_at_another_size_is_not_used_there() -> None:
    model = WrongElsewhere().eval()
    cached = bw.transform(model, OFF, example_args=one(2, 6), dynamic_shapes="auto")
    for tokens in (6, 7, 9, 7, 6):
        check(cached, model, *one(2, tokens))
    assert counts(cached) == (3, 3)
    check(cached, model, *one(2, 7))
    assert cached.plan.notes[-1] == (
        "each size is captured separately: the graph with dynamic sizes differs from the model at ((2, 7, 4), (2,)):"
        " output 0 differs by up to 1"
    )


def test_chosen_sizes() -> None:
    model = OneStream().eval()
    tokens = Dim("tokens", min=4, max=16)
    cached = bw.transform(model, OFF, example_args=one(2, 6), dynamic_shapes={"x": {1: tokens}})
    for count in (6, 4, 16):
        check(cached, model, *one(2, count))
    assert counts(cached) == (1, 1)
    assert "sizes are dynamic; bytes are given for" in str(cached.plan)
    check(cached, model, *one(2, 17))
    assert counts(cached) == (2, 2), "past the range that was asked for"
    with pytest.raises(bw.ConfigError) as caught:
        bw.transform(model, OFF, example_args=one(2, 6), dynamic_shapes={"frames": {1: tokens}})
    assert str(caught.value) == "dynamic_shapes names 'frames', but this call of OneStream passes only 'x', 't'."


def test_an_open_int() -> None:
    """Frames, height and width as plain ints, as LTX takes them."""

    class Ints(OneStream):
        def forward(self, x: Tensor, t: Tensor, *, height: int, width: int) -> Tensor:
            rows = torch.arange(height, dtype=torch.float32)[:, None] + torch.arange(width, dtype=torch.float32)[None] * 0.1
            return super().forward(x + rows.reshape(1, height * width, 1), t)

    model = Ints().eval()
    cached = bw.transform(model, OFF)
    for height, width in ((2, 3), (4, 3), (3, 5), (2, 3)):
        cached.reset()
        x, t = one(2, height * width)
        with torch.no_grad():
            assert torch.equal(cached(x, t, height=height, width=width), model(x, t, height=height, width=width))
    assert counts(cached) == (2, 1)


MODELS = {
    "one": (OneStream, lambda b, n, m: one(b, n)),
    "two": (TwoStream, two),
    "in place": (InPlace, lambda b, n, m: one(b, n)),
    "interleaved": (Interleaved, lambda b, n, m: (noise("x", 0, b, m, n, 4), torch.full((b,), 0.5))),
}


@pytest.fixture(scope="module", params=list(MODELS))
def opened(request: pytest.FixtureRequest) -> tuple[bw.CachedModel, nn.Module, Any]:
    make, inputs = MODELS[request.param]
    model: nn.Module = make().eval()
    captured = capture(model, inputs(2, 6, 3), {}, "auto")
    toolchain = Toolchain(capture=lambda *_, **__: captured.fresh(), build=passes.build, explain=passes.explain)
    return bw.CachedModel(model, bw.CacheConfig(threshold=0, num_steps=2, indicator_tokens=3), toolchain, "auto"), model, inputs


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(2, 5), tokens=st.integers(2, 40), words=st.integers(2, 9))
def test_any_size_from_two_on_is_the_model_bit_for_bit(opened: Any, batch: int, tokens: int, words: int) -> None:
    cached, model, inputs = opened
    drawn = inputs(batch, tokens, words)
    cached.reset()
    for _ in range(2):
        with cached.cache_context("drawn", step_index=0):
            assert torch.equal(run(cached, *drawn), run(model, *drawn))
    assert counts(cached) == (1, 1)
