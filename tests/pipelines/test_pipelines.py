"""A transformed model in a real pipeline: whatever was done to it before, each run equals that of a fresh one bit for bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bwcache_compile as bw
from bwcache_compile import passes
from bwcache_compile.capture.capture import capture
from bwcache_compile.ir.program import ModelProgram
from bwcache_compile.runtime import Toolchain
from bwcache_compile.runtime.signature import call_key, leaves_of
from tests.pipelines.cases import CASES, STEPS
from tests.zoo.selection import selected

CONFIG = bw.CacheConfig(num_steps=STEPS, threshold=float("inf"), reuse_interval=1, tail=0.0)
PATTERN = "##.#"


class Transform:
    """`bw.transform` that captures each signature of an unchanged model once: exporting is the slow part."""

    def __init__(self) -> None:
        self.captured: dict[Any, ModelProgram] = {}

    def _capture(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any, reading: bool, **_: Any
    ) -> ModelProgram:
        key = call_key(*leaves_of(args, kwargs)), str(shapes), reading
        if key not in self.captured:
            self.captured[key] = capture(model, args, kwargs, shapes, reading)
        return self.captured[key].fresh()

    def __call__(self, model: nn.Module, config: bw.CacheConfig = CONFIG) -> bw.CachedModel:
        return bw.CachedModel(model, config, Toolchain(capture=self._capture, build=passes.build, explain=passes.explain))


def patterns(cached: bw.CachedModel) -> dict[str, str]:
    contexts = cached.report().contexts
    return {name: "".join("#" if step.computed else "." for step in context.steps) for name, context in contexts.items()}


@pytest.mark.parametrize("name", selected(CASES, always=()))
def test_every_run_is_a_fresh_pipelines(name: str) -> None:
    case = CASES[name]
    model, transform = case.model(), Transform()
    pipe = case.pipeline(model)

    def fresh(width: int, length: int) -> Tensor:
        return case.run(case.pipeline(transform(model)), width, length)

    (small, large), length = case.widths, 6
    eager = case.run(pipe, small, length)
    cached = pipe.transformer = transform(pipe.transformer)
    first = case.run(pipe, small, length)
    assert patterns(cached) == dict.fromkeys(case.contexts, PATTERN)
    assert not torch.equal(first, eager), "nothing was reused"
    assert torch.equal(first, fresh(small, length))
    assert torch.equal(first, case.run(pipe, small, length)), "a second run"
    case.break_off(pipe, small, length, after=2)
    assert torch.equal(first, case.run(pipe, small, length)), "after a run that was broken off"
    for width, prompt in ((large, length), (small, length - 1), (small, length)):
        assert torch.equal(case.run(pipe, width, prompt), fresh(width, prompt))
    assert cached.report().captures <= 3, "one at the first size, and dynamic sizes, with or without the prompt's"
    assert cached.report().warnings == ()


def test_two_experts_share_a_run() -> None:
    case = CASES["wan"]
    high, low, transform = case.model(), case.model(), Transform()
    low.load_state_dict({name: value * 1.2 for name, value in low.state_dict().items()})

    def pipeline(first: nn.Module, second: nn.Module) -> Any:
        pipe = case.pipeline(first)
        pipe.register_modules(transformer_2=second)
        pipe.register_to_config(boundary_ratio=0.6)
        return pipe

    def run(pipe: Any) -> Tensor:
        return case.run(pipe, 32, 6, num_inference_steps=6)

    config = dataclasses.replace(CONFIG, num_steps=None)
    pipe = pipeline(high, low)
    eager = run(pipe)
    second = Transform()
    pipe.transformer, pipe.transformer_2 = transform(high, config), second(low, config)
    first = run(pipe)
    assert not torch.equal(first, eager)
    for expert in (pipe.transformer, pipe.transformer_2):
        assert patterns(expert) == {"cond": "##.", "uncond": "##."}
    assert [step.step for step in pipe.transformer_2.report().contexts["cond"].steps] == [3, 4, 5], "it joins late, and counts on"
    assert torch.equal(run(pipe), first)
    assert torch.equal(run(pipeline(transform(high, config), second(low, config))), first)


def test_a_run_that_was_broken_off_leaves_nothing_behind() -> None:
    case = CASES["flux"]  # names its contexts, but gives no step
    pipe = case.pipeline(case.model())
    cached = pipe.transformer = bw.transform(pipe.transformer, CONFIG)
    whole = case.run(pipe, 32, 6)
    case.break_off(pipe, 32, 6, after=2)
    assert patterns(cached) == {"cond": "##", "uncond": "##"}
    assert torch.equal(case.run(pipe, 32, 6), whole)
    assert patterns(cached) == {"cond": PATTERN, "uncond": PATTERN}
    assert cached.report().warnings == (
        "cond: the timestep went back before step 2: a new generation began",
        "uncond: the timestep went back before step 2: a new generation began",
    )


@pytest.mark.parametrize("name", selected(CASES, always={"flux"}))  # its pipeline casts the time
def test_in_bfloat16_repeated_and_broken_off(name: str) -> None:
    case = CASES[name]
    pipe = case.pipeline(case.model().bfloat16())
    width = case.widths[0]
    eager = case.run(pipe, width, 6)
    cached = pipe.transformer = bw.transform(pipe.transformer, CONFIG)
    first = case.run(pipe, width, 6)
    assert first.dtype is eager.dtype
    assert patterns(cached) == dict.fromkeys(case.contexts, PATTERN)
    assert not torch.equal(first, eager), "nothing was reused"
    assert torch.equal(case.run(pipe, width, 6), first), "a second run"
    case.break_off(pipe, width, 6, after=2)
    assert torch.equal(case.run(pipe, width, 6), first), "after a run that was broken off"
    cached.configure(threshold=0)
    assert torch.equal(case.run(pipe, width, 6), eager)
    # the count of calls does not end runs of 28 steps here: the next one is told by its time alone
    cached.configure(threshold=float("inf"), reuse_interval=3, num_steps=50)
    shorter = case.run(pipe, width, 6, num_inference_steps=28)
    assert all("." in steps for steps in patterns(cached).values())
    assert torch.equal(case.run(pipe, width, 6, num_inference_steps=28), shorter)
