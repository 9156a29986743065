"""Pipelines that open no cache context: their calls are told apart by the time and by their order."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import bwcache_compile as bw
from tests.pipelines.cases import STEPS, UNNAMED

CONFIG = bw.CacheConfig(num_steps=STEPS, threshold=float("inf"), reuse_interval=1, tail=0.0)


@pytest.mark.parametrize(("name", "calls"), [("sd3", 1), ("kandinsky5", 2)])
def test_calls_without_a_name(name: str, calls: int) -> None:
    case = UNNAMED[name]
    model = case.model()
    pipe = case.pipeline(model)
    width = case.widths[0]
    eager = case.run(pipe, width, 6)
    cached = pipe.transformer = bw.transform(model, dataclasses.replace(CONFIG, calls_per_step=calls))
    first = case.run(pipe, width, 6)
    contexts = cached.report().contexts
    assert {context: "".join("#" if step.computed else "." for step in contexts[context].steps) for context in contexts} == dict.fromkeys(
        case.contexts, "##.#"
    )
    assert not torch.equal(first, eager), "nothing was reused"
    assert torch.equal(case.run(pipe, width, 6), first), "a second run"
    cached.configure(threshold=0)
    assert torch.equal(case.run(pipe, width, 6), eager)
    assert (cached.report().captures, cached.report().warnings) == (1, ())


def test_two_calls_a_step_are_refused_until_they_are_told_apart() -> None:
    case = UNNAMED["kandinsky5"]
    pipe = case.pipeline(case.model())
    cached = pipe.transformer = bw.transform(pipe.transformer, CONFIG)
    with pytest.raises(bw.StateError, match=r"^two consecutive calls have the same timestep: .*calls_per_step=2"):
        case.run(pipe, case.widths[0], 6)
    cached.reset()
    once = case.run(pipe, case.widths[0], 6, guidance_scale=1.0)
    assert torch.equal(once, case.run(pipe, case.widths[0], 6, guidance_scale=1.0)), "without guidance it calls once a step"
