"""Calibration on several ranks that run one model: each finds the plan that one process finds, with no exchange of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import bwcache_compile as bw
from tests.distributed.models import KINDS
from tests.distributed.ranks import run

STEPS, BUDGET = 12, 0.5


@dataclasses.dataclass(frozen=True)
class Found:
    """What a rank found, and what it returned by its plan."""

    mask: tuple[bool, ...]
    weights: Tensor
    psnr: float
    video: Tensor
    computed: list[bool]


def calibrated(name: str) -> Found:
    """Calibrate a model on this rank, and run the plan."""
    kind = KINDS[name]

    def generate(model: Any) -> Tensor:
        first, *others = kind.inputs(0, STEPS)
        latents = first
        with torch.no_grad():
            for step in range(STEPS):
                time = kind.inputs(step, STEPS)[1]
                out = kind.call(model, (latents, time, *others[1:]))
                latents = latents - out / STEPS
        return latents

    cached = bw.transform(kind.model(), num_steps=STEPS)
    plan = bw.calibrate(cached, generate, budgets=(BUDGET,), anchors=3, progress=False)
    cached.configure(plan.at(BUDGET))
    video, (entry,) = generate(cached), plan.entries
    (context,) = cached.report().contexts.values()
    return Found(entry.mask, torch.tensor(entry.weights), entry.psnr, video, [record.computed for record in context.steps])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "apart"),
    [("megatron", 0.02), ("wan_ulysses", 0.02), ("ulysses", 0.1)],  # fits of outputs that differ by rounding; of some of the tokens
)
def test_every_rank_finds_the_plan_of_one_process(name: str, apart: float, tmp_path: Path) -> None:
    alone = calibrated(name)
    assert not dist.is_initialized()
    assert alone.psnr > 30
    for rank in run(calibrated, 2, tmp_path, name):
        assert isinstance(rank, Found), (rank, getattr(rank, "__notes__", ""))
        assert rank.mask == alone.mask
        assert rank.computed == list(alone.mask), "the plan runs on ranks without a process group"
        torch.testing.assert_close(rank.weights, alone.weights, rtol=0, atol=apart)
        torch.testing.assert_close(rank.video, alone.video, rtol=1e-3, atol=1e-3)


def branches(model: Any, latents: Tensor, time: Tensor, parallel: bool) -> list[Tensor]:
    """Run both guidance branches: each on a rank of its own, or both in this process."""
    if parallel:
        mine = model(latents * (1 + dist.get_rank()), time).contiguous()
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine)
        return both
    both = []
    for number, name in enumerate(("cond", "uncond")):
        with model.cache_context(name):
            both.append(model(latents * (1 + number), time))
    return both


def guided(parallel: bool) -> Found:
    """Calibrate with both branches in each process, and run the plan with the branches where they are to be."""

    def generate(model: Any, parallel: bool = False) -> Tensor:
        latents = KINDS["megatron"].inputs(0, STEPS)[0]
        with torch.no_grad():
            for step in range(STEPS):
                cond, uncond = branches(model, latents, KINDS["megatron"].inputs(step, STEPS)[1], parallel)
                latents = latents - (uncond + 2 * (cond - uncond)) / STEPS
        return latents

    cached = bw.transform(KINDS["megatron"].make().eval(), num_steps=STEPS, process_group=dist.group.WORLD if parallel else None)
    plan = bw.calibrate(cached, generate, budgets=(BUDGET,), anchors=3, progress=False)
    cached.configure(plan.at(BUDGET))
    video, (entry,) = generate(cached, parallel), plan.entries
    context, *_ = cached.report().contexts.values()
    return Found(entry.mask, torch.tensor(entry.weights), entry.psnr, video, [record.computed for record in context.steps])


@pytest.mark.slow
def test_a_plan_of_both_branches_runs_with_each_on_a_rank_of_its_own(tmp_path: Path) -> None:
    alone = guided(False)
    assert alone.psnr > 40
    for rank in run(guided, 2, tmp_path, True):
        assert isinstance(rank, Found), (rank, getattr(rank, "__notes__", ""))
        assert rank.mask == alone.mask
        assert rank.computed == list(alone.mask)
        torch.testing.assert_close(rank.weights, alone.weights, rtol=0, atol=0)  # both ranks do what one process does
        torch.testing.assert_close(rank.video, alone.video, rtol=1e-5, atol=1e-5)
