"""Ranks capture a model together or not at all: one that cannot capture it lets none of them wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import bwcache_compile as bw
from tests.distributed.models import TOKENS, Ulysses, inputs
from tests.distributed.ranks import TIMEOUT, run
from tests.models import Block, OneStream, noise

STEPS = 6
MEASURED: dict[str, Any] = {"policy": "schedule", "threshold": 0.3, "reuse_interval": 2, "num_steps": STEPS, "indicator_tokens": "all"}


def traced(strictly: bool) -> bool:
    """Whether a model is being exported, in one of the two ways."""
    return torch.compiler.is_exporting() and torch.compiler.is_dynamo_compiling() == strictly


class Unlike(nn.Module):
    """Wraps a model. What a graph of it holds differs from what it does, on the ranks and in the ways that are given."""

    def __init__(self, model: nn.Module, ranks: tuple[int, ...], fails: bool, strictly: tuple[bool, ...]) -> None:
        super().__init__()
        self.model, self.fails = model, fails
        self.ways = strictly if dist.get_rank() in ranks else ()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.model(x, t)
        for way in self.ways:
            if traced(way):
                if self.fails:
                    raise RuntimeError("this rank has another library")
                out = out + 1
        return out


class UnlikeBlock(Block):
    """A block whose graph differs from what it does on rank 1."""

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return super().forward(x, temb) + (1 if torch.compiler.is_exporting() and dist.get_rank() else 0)


class Forgetful(Block):
    """Returns something else at each call on rank 1, which nothing but a comparison shows."""

    calls = 0

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        type(self).calls += dist.get_rank()
        return super().forward(x, temb) + type(self).calls


def one_stream() -> OneStream:
    return OneStream(3, 8)


def with_blocks(kind: type[Block]) -> OneStream:
    model = one_stream()
    model.blocks = nn.ModuleList(kind(8) for _ in range(3))
    return model


def shallow() -> OneStream:
    """Have a single block on rank 1, which does not repeat."""
    return OneStream(1 if dist.get_rank() else 3, 8)


class Scattered(OneStream):
    """Holds its blocks one by one on rank 1, where nothing finds them but a graph."""

    def __init__(self) -> None:
        super().__init__(3, 8)
        self.first, self.second, self.third = self.blocks
        if dist.get_rank():
            del self.blocks

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, temb = self.patch(x), self.embed(t)
        for block in (self.first, self.second, self.third) if dist.get_rank() else self.blocks:
            x = block(x, temb)
        return self.head(x)


BOTH = (False, True)
CASES: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "differs": ("whole", lambda: Unlike(one_stream(), (1,), False, BOTH)),
    "differs with collectives": ("whole", lambda: Unlike(Ulysses(), (1,), False, BOTH)),
    "cannot be traced": ("whole", lambda: Unlike(one_stream(), (1,), True, BOTH)),
    "cannot be traced with collectives": ("whole", lambda: Unlike(Ulysses(), (1,), True, BOTH)),
    "no repeated blocks": ("whole", shallow),
    "differs by stack": ("region", lambda: with_blocks(UnlikeBlock)),
    "no stack": ("region", shallow),
    "no list of blocks": ("opaque", Scattered),
    "another result": ("opaque", lambda: with_blocks(Forgetful)),
}
REASONS = {
    "differs": "on rank 1: output 0 differs by up to 1",
    "cannot be traced": "on rank 1: non-strict: RuntimeError: this rank has another library",
    "no repeated blocks": "on rank 1: NoBlocksFoundError: no repeated",
    "differs by stack": "on rank 1: output 0 differs by up to",
    "no stack": "on rank 1: OneStream has no stack of blocks",
    "no list of blocks": "on rank 1: CaptureError: Scattered has no blocks",
    "another result": "on rank 1: output 0 differs by up to",
}


def first_calls(names: list[str]) -> list[tuple[str, str, float]]:
    """Return what the first call of each model raises, and how long it takes."""
    raised = []
    for name in names:
        capture, make = CASES[name]
        for again in range(2):  # the second call is a first one again
            if not again:
                model = make().eval()
                cached: Any = bw.transform(model, MEASURED, capture=capture, process_group=dist.group.WORLD)  # type: ignore[call-overload]
            began = time.monotonic()
            try:
                with torch.no_grad():
                    cached(noise("x", 0, 1, TOKENS // 2, 4), torch.ones(1))
                raised.append(("nothing", "", 0.0))
            except Exception as error:
                raised.append((type(error).__name__, str(error), time.monotonic() - began))
        dist.barrier()
    return raised


def check_failures(names: list[str], folder: Path) -> None:
    """All ranks raise one error, which names rank 1 and its reason, at once."""
    first, second = run(first_calls, 2, folder, names)
    assert isinstance(first, list), (first, getattr(first, "__notes__", ""))
    assert isinstance(second, list), (second, getattr(second, "__notes__", ""))
    for number, name in enumerate(name for name in names for _ in range(2)):
        (kind, said, seconds), (kind1, said1, seconds1) = first[number], second[number]
        assert (kind, kind1) == ("CaptureError", "CaptureError"), (name, said, said1)
        assert said == said1, name
        assert REASONS[name.removesuffix(" with collectives")] in said, (name, said)
        assert "on rank 0" not in said, name
        assert max(seconds, seconds1) < TIMEOUT.total_seconds(), name


def test_a_rank_that_cannot_capture_ends_all_of_them(tmp_path: Path) -> None:
    check_failures(["differs"], tmp_path)


@pytest.mark.slow
def test_a_rank_that_cannot_capture_ends_all_of_them_in_every_way(tmp_path: Path) -> None:
    check_failures([name for name in CASES if name != "differs"], tmp_path)


def captured(ranks: tuple[int, ...], fails: bool) -> list[bool]:
    """Run a model whose non-strict capture is wrong on some ranks."""
    cached = bw.transform(Unlike(Ulysses(), ranks, fails, (False,)).eval(), MEASURED, process_group=dist.group.WORLD)
    rank = dist.get_rank()
    with torch.no_grad():
        for step in range(STEPS):
            x, t = inputs(step, STEPS)
            cached(x.chunk(2, dim=1)[rank].contiguous(), t)
    return [record.computed for record in cached.report().contexts["default"].steps]


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("ranks", [(0, 1), (1,)])
def test_ranks_go_on_to_the_next_way_of_tracing_together(ranks: tuple[int, ...], fails: bool, tmp_path: Path) -> None:
    first, second = run(captured, 2, tmp_path, ranks, fails)
    assert isinstance(first, list), (first, getattr(first, "__notes__", ""))
    assert first == second
    assert False in first


def other_sizes() -> list[bool]:
    """Capture anew on rank 1 alone, whose prompt has another length in the second run."""
    cached = bw.transform(one_stream().eval(), MEASURED, process_group=dist.group.WORLD)
    decided = []
    for generation in range(3):
        tokens = 6 + generation * dist.get_rank()
        with torch.no_grad():
            for step in range(STEPS):
                cached(noise("x", step, 1, tokens, 4), torch.full((1,), 1 - step / STEPS))
        decided += [record.computed for record in cached.report().contexts["default"].steps]
    assert cached.report().captures == 1 + dist.get_rank()
    return decided


@pytest.mark.slow
def test_a_later_capture_of_one_rank_makes_no_other_wait(tmp_path: Path) -> None:
    first, second = run(other_sizes, 2, tmp_path)
    assert isinstance(first, list), (first, getattr(first, "__notes__", ""))
    assert first == second
    assert False in first


def all_fail() -> str:
    """Fail alike on all ranks."""
    with pytest.raises(bw.NoBlocksFoundError) as caught:
        bw.transform(OneStream(1, 8).eval(), MEASURED, process_group=dist.group.WORLD, example_args=OneStream().example())
    return str(caught.value)


@pytest.mark.slow
def test_what_all_ranks_fail_of_is_said_as_in_one_process(tmp_path: Path) -> None:
    with pytest.raises(bw.NoBlocksFoundError) as caught:
        bw.transform(OneStream(1, 8).eval(), MEASURED, example_args=OneStream().example())
    assert run(all_fail, 2, tmp_path) == [str(caught.value)] * 2
