"""Replayed CUDA graphs overwrite what they returned before: what is kept and what is handed out is copied then, and only then.

No GPU is needed: `replaying` stands for `torch.compile(mode="reduce-overhead")`, and spoils what it returned at its next run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import bwcache_compile as bw
from bwcache_compile.runtime import runnable_graphs
from bwcache_compile.runtime.compilation import Compilation, owned
from bwcache_compile.runtime.runnable import RunnableProgram
from tests.models import OneStream
from tests.runtime.helpers import STATIC, run

GRAPHS = {"mode": "reduce-overhead"}
LINEAR = bw.CacheConfig(policy="static", steps_mask=(0, 0, 1, 0, 1, 1), reuse="linear", anchors=3)
CONFIGS = {"output": STATIC, "linear": LINEAR, "cut": dataclasses.replace(LINEAR, cut="output")}


def replaying(module: nn.Module, **options: Any) -> Callable[..., Any]:
    """Return what runs a module into the same memory at each call, as the CUDA graphs of all modules together do."""
    assert options == GRAPHS

    def call(*args: Any, **kwargs: Any) -> Any:
        for tensor in POOL:
            tensor.fill_(torch.nan if tensor.is_floating_point() else -999)
        POOL.clear()
        given = {id(leaf) for leaf in pytree.tree_leaves((args, kwargs))}
        leaves, spec = pytree.tree_flatten(module(*args, **kwargs))
        leaves = [leaf if id(leaf) in given else leaf.clone() for leaf in leaves]  # an input is returned as it is
        POOL.extend(leaf for leaf in leaves if id(leaf) not in given)
        return pytree.tree_unflatten(leaves, spec)

    return call


POOL: list[Tensor] = []


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Let `torch.compile` replay, and let programs say so."""
    POOL.clear()
    monkeypatch.setattr(torch, "compile", replaying)
    monkeypatch.setattr(RunnableProgram, "replays", lambda self: True)
    return monkeypatch


def steps(cached: nn.Module, model: OneStream) -> list[Tensor]:
    """Run two contexts in turn, and return all outputs at the end."""
    found = []
    for step in range(6):
        for shift, name in enumerate(("cond", "uncond")):
            with cached.cache_context(name, step_index=step):
                found.append(run(cached, *model.example(step=step + shift)))
    return found


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_outputs_and_state_outlive_replays(model: OneStream, graphs: pytest.MonkeyPatch, config: bw.CacheConfig) -> None:
    expected = steps(bw.transform(model, config), model)
    cached = bw.transform(model, config)
    cached.compile(**GRAPHS)
    found = steps(cached, model)
    assert all(map(torch.equal, found, expected))
    graphs.setattr(RunnableProgram, "replays", lambda self: False)
    assert not all(map(torch.equal, steps(cached, model), expected)), "the double overwrites nothing"


@pytest.mark.parametrize("guard", ["host", "graph"])
def test_the_functional_form_outlives_replays(model: OneStream, graphs: pytest.MonkeyPatch, guard: str) -> None:
    config = bw.CacheConfig(num_steps=6, threshold=0.5)
    example = model.example()

    def found(cached: bw.CachedModel) -> list[Tensor]:
        state, outputs = cached.init_state(example), []
        for step in range(6):
            output, state = cached.functional_step(model.example(step=step), {}, state)
            outputs.append(output)
        return [*outputs, *state.slots]

    cached = bw.transform(model, config, example_args=example, guard=guard)
    expected = found(cached)
    cached.compile(**GRAPHS)
    assert all(map(torch.equal, found(cached), expected))


def test_each_graph_is_recorded_by_the_warm_up(model: OneStream, graphs: pytest.MonkeyPatch) -> None:
    """The first run of a compiled graph compiles it, and the second one records the CUDA graph."""
    cached = bw.transform(model, STATIC, example_args=model.example())
    ran = []
    cached.compile(**GRAPHS)
    latest = cached._programs.latest
    latest.graphs = {kind: lambda *values, kind=kind: ran.append(kind) for kind in latest.graphs}
    cached.warm_up(model.example())
    assert ran == ["compute", "compute", "reuse", "reuse"]


def test_what_lies_in_our_memory_is_not_copied() -> None:
    kept, returned = torch.ones(2), torch.zeros(2)
    values = owned([kept.detach(), returned, None, 3], [kept])
    assert values[0].data_ptr() == kept.data_ptr()
    assert values[1].data_ptr() != returned.data_ptr()
    assert values[2:] == [None, 3]


@pytest.mark.parametrize(
    ("options", "outer", "replays"),
    [
        (None, False, False),  # eager: nothing is overwritten
        (None, True, True),  # an outer torch.compile may replay
        ({}, True, False),
        ({"mode": "max-autotune-no-cudagraphs"}, False, False),
        ({"mode": "reduce-overhead"}, False, True),
        ({"mode": "max-autotune"}, False, True),
        ({"options": {"triton.cudagraphs": True}}, False, True),
        ({"backend": "cudagraphs"}, False, True),
        ({"backend": "eager"}, True, False),
    ],
)
def test_who_replays(model: OneStream, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any] | None, outer: bool, replays: bool) -> None:
    cached = bw.transform(model, bw.CacheConfig(num_steps=4), example_args=model.example())
    program = cached.program
    for device, expected in (("cpu", False), ("cuda", replays)):
        placed = program.replace(plan=dataclasses.replace(program.planned(), device=torch.device(device)))
        runnable = RunnableProgram(placed, cached._programs.latest.key)
        if options is not None:
            runnable.compile(Compilation(options))
        monkeypatch.setattr(runnable_graphs, "get_eval_frame_callback", lambda: steps if outer else None)
        assert runnable.replays() == expected


def test_copies_are_made_only_where_a_graph_is_replayed(model: OneStream) -> None:
    cached = bw.transform(model, bw.CacheConfig(num_steps=4), example_args=model.example())
    state, latest = cached.init_state(model.example()), cached._programs.latest
    assert isinstance(state, bw.CacheState)
    for replayed in (False, True):
        returned = cached.program.compute(*latest.operands(model.example(), state, cached.policy_parameters()))
        output, following, change = latest.split(returned, state, replayed)
        assert change is not None
        graphs = {value.data_ptr() for value in returned}
        kept = {value.data_ptr() for value in [output, *following.slots, change]}
        assert not graphs & kept if replayed else kept <= graphs
        assert torch.equal(change, returned[-1])
