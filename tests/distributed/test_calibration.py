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
@pytest.mark.parametrize("name", ["megatron", "wan_ulysses"])
def test_every_rank_finds_the_plan_of_one_process(name: str, tmp_path: Path) -> None:
    alone = calibrated(name)
    assert not dist.is_initialized()
    assert alone.psnr > 30
    for rank in run(calibrated, 2, tmp_path, name):
        assert isinstance(rank, Found), (rank, getattr(rank, "__notes__", ""))
        assert rank.mask == alone.mask
        assert rank.computed == list(alone.mask), "the plan runs on ranks without a process group"
        torch.testing.assert_close(rank.weights, alone.weights, rtol=0, atol=0.02)  # fits of outputs that differ by rounding
        torch.testing.assert_close(rank.video, alone.video, rtol=1e-3, atol=1e-3)
