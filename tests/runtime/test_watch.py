"""What is noticed of a model between two calls: what its graphs hold is right, or it is captured anew."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bwcache_compile as bw
from bwcache_compile.runtime import watch
from tests.models import OneStream, noise
from tests.runtime.helpers import run

REUSE = bw.CacheConfig(policy="static", steps_mask=(0, 1, 1, 1, 1, 1, 1, 1))
OFF = bw.CacheConfig(num_steps=4, threshold=0)


class Scaled(OneStream):
    """Holds tensors that are no parameters: a buffer, an attribute, and entries of a list and a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("buffer", torch.ones(1))
        self.attribute = torch.ones(1)
        self.listed = [torch.ones(1)]
        self.named = {"one": torch.ones(1)}

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x * self.buffer * self.attribute * self.listed[0] * self.named["one"], t)


PLACES: list[Callable[[Any], Tensor]] = [lambda m: m.buffer, lambda m: m.attribute, lambda m: m.listed[0], lambda m: m.named["one"]]


@pytest.mark.parametrize("place", PLACES, ids=["buffer", "attribute", "list", "dict"])
def test_a_tensor_edited_in_place_is_noticed_at_the_next_step(place: Callable[[Any], Tensor]) -> None:
    model = Scaled().eval()
    cached = bw.transform(model, REUSE)
    run(cached, *model.example())
    place(model).fill_(3)
    assert torch.equal(run(cached, *model.example(step=1)), run(model, *model.example(step=1)))
    run(cached, *model.example(step=2))
    assert [record.computed for record in cached.report().contexts["default"].steps] == [True, True, False]


class Conditioned(OneStream):
    """Keeps what it makes of the prompt, as a sampler that clears it between prompts expects."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.kept = nn.Linear(5, 8), None

    def example(self, batch: int = 1, step: int = 0) -> tuple[Tensor, ...]:
        x, t = super().example(batch, step)
        return x, noise(f"text {step // 2}", 0, batch, 1, 5), t

    def forward(self, x: Tensor, text: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
        if self.kept is None:
            self.kept = self.words(text)
        return super().forward(x, t) + self.kept.mean()


def test_a_condition_that_a_model_keeps_is_that_of_its_prompt() -> None:
    model, eager = Conditioned().eval(), Conditioned().eval()
    cached = bw.transform(model, bw.CacheConfig(num_steps=2, threshold=0))
    for step in range(8):
        if step % 2 == 0:
            model.kept = eager.kept = None
            with pytest.warns(bw.CacheWarning, match=r"^the graph of Conditioned does not read the inputs 'text'"):
                output = run(cached, *model.example(step=step))
        else:
            output = run(cached, *model.example(step=step))
        assert torch.equal(output, run(eager, *model.example(step=step))), step


class OwnStepCache(OneStream):
    """Counts its calls and keeps its last residual, as TeaCache does."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.previous_residual = 0, None

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out = super().forward(x, t)
        if self.count < 1000:
            self.previous_residual = out - x
        self.count += 1
        return out


def test_a_step_cache_of_the_models_own_is_named() -> None:
    model = OwnStepCache().eval()
    said = r"^OwnStepCache counts its calls \('count'\) and stores what it computed \('previous_residual'\)"
    with pytest.warns(bw.CacheWarning, match=said):
        run(bw.transform(model, OFF), *model.example())


def test_a_model_of_many_modules_is_looked_over_at_each_computed_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_GLANCE", 50)
    model = OneStream().eval()
    cached = bw.transform(model, bw.CacheConfig(policy="static", steps_mask=(0, 1, 0, *[1] * 30)))
    run(cached, *model.example())
    assert len(cached._programs.watch._parts) > 1
    run(cached, *model.example(step=1))
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert torch.equal(run(cached, *model.example(step=2)), run(model, *model.example(step=2)))
    run(cached, *model.example(step=3))
    with torch.no_grad():
        model.head.weight.mul_(2)
    for step in range(4, 4 + len(cached._programs.watch._parts)):  # reused steps look at one part each
        run(cached, *model.example(step=step))
    assert sum(record.computed for record in cached.report().contexts["default"].steps) == 3
    cached.load_state_dict({name: value * 2 for name, value in model.state_dict().items()})
    step += 1
    assert torch.equal(run(cached, *model.example(step=step)), run(model, *model.example(step=step))), "through the wrapper: at once"


@pytest.mark.parametrize("through_wrapper", [False, True])
def test_a_cast_captures_anew(through_wrapper: bool) -> None:
    model = OneStream().eval()
    cached = bw.transform(model, OFF)
    run(cached, *model.example())
    (cached if through_wrapper else model).double()
    with pytest.raises(RuntimeError, match="dtype"):
        run(cached, *model.example(step=1))
    doubled = [tensor.double() for tensor in model.example(step=1)]
    assert torch.equal(run(cached, *doubled), run(model, *doubled))


def test_weights_that_a_model_dropped_are_freed() -> None:
    model = OneStream().eval()
    cached = bw.transform(model, OFF)
    for name in ("one", "idle"):
        with cached.cache_context(name):
            run(cached, *model.example())
    old = weakref.ref(model.blocks[0].up.weight)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    with cached.cache_context("one"):
        run(cached, *model.example(step=1))
    gc.collect()
    assert old() is None


def test_settings_and_step_numbers_are_bounded() -> None:
    model = OneStream().eval()
    cached = bw.transform(model, bw.CacheConfig(num_steps=600, threshold=0))
    for step in range(300):
        cached.configure(threshold=1e-9 * step)
        run(cached, *model.example(step=step))
    runnable = cached._programs.latest
    assert len(runnable._settings) <= 8
    assert len(runnable._steps) <= 256


@pytest.mark.parametrize("guard", ["host", "graph"])
def test_a_state_made_with_other_weights_is_refused(guard: Any) -> None:
    model = OneStream().eval()
    cached = bw.transform(model, REUSE, guard=guard)
    _, state = cached.functional_step(model.example(), {}, cached.init_state(model.example()))
    cached.functional_step(model.example(step=1), {}, state)
    with torch.no_grad():
        model.head.weight.mul_(2)
    with pytest.raises(bw.StateError) as caught:
        cached.functional_step(model.example(step=1), {}, state)
    assert str(caught.value) == "the model's weights or modules changed since this state was made. Create a new one with cached.init_state."
