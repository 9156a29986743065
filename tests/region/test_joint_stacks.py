"""Stacks and contexts of models without a whole graph that decide together."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bwcache_compile as bw
from tests.models import Block, OneStream
from tests.runtime.helpers import pattern
from tests.runtime.test_joint import CONFIG, generation


class TwoStacks(OneStream):
    """Scales the stream halfway: its blocks are two stacks by region, and one region of a whole capture."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.ModuleList(Block(8) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, temb = self.patch(x), self.embed(t)
        for block in self.blocks:
            x = block(x, temb)
        x = torch.tanh(x)
        for block in self.more:
            x = block(x, temb)
        return self.head(x)


STACKS = ("blocks.0", "more.0")


def patterns(cached: Any) -> dict[str, str]:
    return {name: pattern(cached, name) for name in cached.report().contexts}


@pytest.mark.parametrize("names", [("cond", "uncond"), ("uncond",)])
def test_all_stacks_follow_the_schedule_of_a_whole_capture(names: tuple[str, ...]) -> None:
    model = TwoStacks().eval()
    whole, region = bw.transform(model, CONFIG), bw.transform(model, CONFIG, capture="region")
    want, made = generation(whole, model, names), generation(region, model, names)
    (schedule,) = set(patterns(whole).values())
    assert "." in schedule
    assert patterns(region) == {f"{name} ({stack})": schedule for name in names for stack in STACKS}
    for name in names:
        for got, expected in zip(made[name], want[name], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    generation(region, model, names)
    assert patterns(region) == {f"{name} ({stack})": schedule for name in names for stack in STACKS}, "another run"


def test_stacks_decide_otherwise_on_their_own() -> None:
    model = TwoStacks().eval()
    cached = bw.transform(model, CONFIG, decide="separate", capture="region")
    generation(cached, model)
    assert len(set(patterns(cached).values())) > 1


@pytest.mark.parametrize("cut", ["blocks", "output"])
def test_contexts_of_an_opaque_model_decide_as_those_of_a_whole_capture(cut: Any) -> None:
    model, settings = OneStream().eval(), dataclasses.replace(CONFIG, cut=cut)
    whole, opaque = bw.transform(model, settings), bw.transform(model, settings, capture="opaque")
    want, made = generation(whole, model), generation(opaque, model)
    for name in ("cond", "uncond"):
        assert pattern(opaque, name) == pattern(whole, name) == "######..#.##"
        assert all(torch.equal(a, b) for a, b in zip(made[name], want[name], strict=True))
    opaque.configure(decide="separate")
    generation(opaque, model)
    assert [pattern(opaque, name) for name in ("cond", "uncond")] == ["#####..#..##", "########.###"]


def test_what_an_adaptive_policy_keeps_is_decided_together() -> None:
    model = OneStream().eval()
    settings = bw.CacheConfig(policy="adaptive", num_steps=12, threshold=0.4, indicator_tokens="all", decide="joint")
    whole, opaque = bw.transform(model, settings), bw.transform(model, settings, capture="opaque")
    generation(whole, model)
    generation(opaque, model)
    assert patterns(opaque) == patterns(whole)
    assert "." in pattern(opaque, "cond")


def test_contexts_that_decide_together_are_called_in_turn() -> None:
    model = OneStream().eval()
    cached = bw.transform(model, CONFIG, capture="opaque")
    for name in ("cond", "uncond"):
        with cached.cache_context(name), torch.no_grad():
            cached(*model.example(step=0))
    other = cached._contexts.get("uncond")
    assert other is not None
    with other.lock, cached.cache_context("cond"), pytest.raises(bw.StateError, match="'cond' and 'uncond' share their decisions"):
        cached(*model.example(step=1))
