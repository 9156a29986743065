"""Contexts that decide together against oracles that are told the mean of what both measured."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

import bwcache_compile as bw
from tests.models import OneStream
from tests.reference import Oracle
from tests.runtime.helpers import pattern

CONFIG = bw.CacheConfig.paper(num_steps=12, threshold=0.08, reuse_interval=2, warmup_steps=1, decide="joint")


def inputs(model: OneStream, name: str, step: int) -> tuple[Tensor, Tensor]:
    """`uncond` moves less and less, `cond` more slowly so: alone they would trigger at different steps."""
    x, t = model.example(step=step)
    pace = {"cond": 0.5, "uncond": 0.8}[name]
    return x + sum(pace**i for i in range(step)), t


@torch.no_grad()
def generation(cached: bw.CachedModel, model: OneStream, names: tuple[str, ...] = ("cond", "uncond")) -> dict[str, list[Tensor]]:
    outputs: dict[str, list[Tensor]] = {name: [] for name in names}
    for step in range(12):
        for name in names:
            with cached.cache_context(name):
                outputs[name].append(cached(*inputs(model, name, step)))
    return outputs


def test_joint_contexts_follow_the_mean_of_their_indicators() -> None:
    model = OneStream().eval()
    cached = bw.transform(model, CONFIG)
    outputs = generation(cached, model)
    names = ("cond", "uncond")
    oracles = {name: Oracle(model, list(model.blocks), ("x",), CONFIG) for name in names}
    for step in range(12):
        for name, oracle in oracles.items():
            x, t = inputs(model, name, step)
            torch.testing.assert_close(outputs[name][step], oracle(x=x, t=t), rtol=1e-5, atol=1e-6)
        if not oracles["cond"].reused:
            mean = sum(oracle.indicators[step] for oracle in oracles.values()) / 2
            for oracle in oracles.values():
                oracle.indicators[step] = mean
    assert pattern(cached, "cond") == pattern(cached, "uncond") == "######..#.##"
    separate = bw.transform(model, dataclasses.replace(CONFIG, decide="separate"))
    generation(separate, model)
    assert [pattern(separate, name) for name in names] == ["#####..#..##", "########.###"], "on their own they decide otherwise"


def test_groups_decide_apart() -> None:
    model = OneStream().eval()
    cached = bw.transform(model, CONFIG)
    with torch.no_grad():
        for step in range(12):
            for name in ("cond", "uncond"):
                with cached.cache_context(name, group=name):
                    cached(*inputs(model, name, step))
    assert [pattern(cached, f"{name}/{name}") for name in ("cond", "uncond")] == ["#####..#..##", "########.###"]


@pytest.mark.parametrize("steps", [7, 12])
def test_a_run_that_is_over_has_no_vote(steps: int) -> None:
    model = OneStream().eval()
    cached = bw.transform(model, dataclasses.replace(CONFIG, threshold=math.inf))
    with torch.no_grad():
        for step in range(steps):
            for name in ("cond", "uncond"):
                with cached.cache_context(name):
                    cached(*inputs(model, name, step))
    cached.configure(threshold=0)
    with torch.no_grad():
        for step in range(12):  # another video, without guidance
            x, t = inputs(model, "cond", step)
            with cached.cache_context("cond"):
                assert torch.equal(cached(x + 3, t), model(x + 3, t))
    assert pattern(cached, "cond") == "############"


def test_a_context_that_skips_steps_decides_with_those_that_compute_with_it() -> None:
    model = OneStream().eval()
    cached = bw.transform(model, CONFIG)
    with torch.no_grad():
        for step in range(12):
            for name in ("cond", "uncond") if step in (0, 1, 7, 8, 9, 10, 11) else ("cond",):
                with cached.cache_context(name, step_index=step):
                    cached(*inputs(model, name, step))
    assert pattern(cached, "cond") == "#####..#..##", "alone when the trigger fell; what it reuses stays its own"
    assert pattern(cached, "uncond") == "###..##", "its cache was old at step 7: it computes, and from there on with the other"


def test_contexts_that_decide_together_are_called_in_turn() -> None:
    model = OneStream().eval()
    cached = bw.transform(model, CONFIG)
    for name in ("cond", "uncond"):
        with cached.cache_context(name), torch.no_grad():
            cached(*inputs(model, name, 0))
    other = cached._contexts.get("uncond")
    assert other is not None
    with other.lock, cached.cache_context("cond"), torch.no_grad(), pytest.raises(bw.StateError) as caught:
        cached(*inputs(model, "cond", 1))
    assert str(caught.value) == (
        "contexts 'cond' and 'uncond' share their decisions (decide='joint'), and another thread is running the "
        "second. Call the contexts of a step one after another, or give each video a group of its own: `with "
        "cached.cache_context(name, group=...):`."
    )


def test_blocks_cannot_decide_jointly() -> None:
    with pytest.raises(bw.ConfigError) as caught:
        bw.CacheConfig(granularity="block", reuse="residual", decide="joint")
    assert str(caught.value) == (
        "granularity='block' decides for each block and decide='joint' once for all contexts; they cannot be combined."
    )
