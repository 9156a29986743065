"""Ranks that run one model together compute and reuse the same steps, those of one process."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import bwcache_compile as bw
from tests.distributed.models import PARALLEL, inputs, model_of, whole
from tests.distributed.ranks import run

STEPS = 30
MEASURED: dict[str, Any] = {"policy": "schedule", "threshold": 0.2, "reuse_interval": 2, "num_steps": STEPS, "indicator_tokens": "all"}
MASK = tuple(int(step > 1 and step % 3 != 0) for step in range(STEPS))
MASKED: dict[str, Any] = {"policy": "static", "steps_mask": MASK}


@dataclasses.dataclass(frozen=True)
class Done:
    """What a rank did: its outputs, which steps it computed, and the collectives of each step."""

    outputs: list[Tensor]
    computed: list[bool]
    reductions: list[int]


def generate(kind: str, settings: dict[str, Any], compiled: bool) -> Done:
    """Run a generation on this rank, or without ranks in this process."""
    prepare, call = PARALLEL[kind] if dist.is_initialized() else (lambda model: model, whole)
    reductions, all_reduce = [0], dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        reductions[-1] += 1
        return all_reduce(*args, **kwargs)

    dist.all_reduce = counted  # this process ends with the test
    group = dist.group.WORLD if dist.is_initialized() else None
    cached = bw.transform(prepare(model_of(kind)), capture="opaque", process_group=group, **settings)
    if compiled:
        cached.compile(backend="aot_eager")
    outputs = []
    with torch.no_grad():
        for step in range(STEPS):
            reductions.append(0)
            outputs.append(call(cached, inputs(step, STEPS)).clone())
    dist.all_reduce = all_reduce
    records = cached.report().contexts["default"].steps
    return Done([getattr(out, "full_tensor", lambda out=out: out)() for out in outputs], [r.computed for r in records], reductions[1:])


def kinds() -> list[Any]:
    return [
        pytest.param(kind, count, compiled, marks=pytest.mark.slow) for kind in PARALLEL for count in (2, 4) for compiled in (False, True)
    ]


@pytest.mark.parametrize(("kind", "count", "compiled"), kinds())
def test_ranks_decide_as_one_process(kind: str, count: int, compiled: bool, tmp_path: Path) -> None:
    alone = generate(kind, MEASURED, False)
    assert 0 < sum(alone.computed) < STEPS
    for done in run(generate, count, tmp_path, kind, MEASURED, compiled):
        assert isinstance(done, Done), done
        assert done.computed == alone.computed
        assert done.reductions == [int(computed) for computed in done.computed], "one a computed step, none a reused one"
        for mine, want in zip(done.outputs, alone.outputs, strict=True):
            torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PARALLEL)
def test_a_mask_needs_no_reduction(kind: str, tmp_path: Path) -> None:
    alone = generate(kind, MASKED, False)
    for done in run(generate, 2, tmp_path, kind, MASKED, False):
        assert isinstance(done, Done), done
        assert done.computed == alone.computed == [not reused for reused in MASK]
        assert sum(done.reductions) == 0
        for mine, want in zip(done.outputs, alone.outputs, strict=True):
            torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-5)


def branches(settings: dict[str, Any]) -> tuple[list[bool], list[bool]]:
    """Run one guidance branch on each rank, first with decisions together, then apart."""
    decided = []
    for group in (dist.group.WORLD, None):
        cached = bw.transform(model_of("tensor"), capture="opaque", process_group=group, **settings)
        with torch.no_grad():
            for step in range(STEPS):
                x, t = inputs(step, STEPS, ["cond", "uncond"][dist.get_rank()])
                cached(x * (1 + step * dist.get_rank()), t)  # the second branch changes faster
        decided.append([record.computed for record in cached.report().contexts["default"].steps])
    return decided[0], decided[1]


@pytest.mark.slow
def test_guidance_branches_on_ranks_of_their_own(tmp_path: Path) -> None:
    first, second = run(branches, 2, tmp_path, MEASURED)
    assert first[0] == second[0]
    assert first[1] != second[1], "apart they decide differently"


def broken(settings: dict[str, Any]) -> list[bool]:
    """Measure something that is not a number on one rank, late in the run."""
    cached = bw.transform(model_of("tensor"), capture="opaque", process_group=dist.group.WORLD, **settings)
    with torch.no_grad():
        for step in range(STEPS):
            x, t = inputs(step, STEPS)
            cached(x * (float("nan") if dist.get_rank() and step >= STEPS // 2 else 1), t)
    return [record.computed for record in cached.report().contexts["default"].steps]


@pytest.mark.slow
def test_a_rank_that_measures_no_number_makes_all_compute(tmp_path: Path) -> None:
    first, second = run(broken, 2, tmp_path, {**MEASURED, "tail": 0.0})
    assert first == second
    assert False in first[: STEPS // 2]
    seen = first.index(True, STEPS // 2)  # the first computed step that measures it
    assert all(first[seen:])


def dying(settings: dict[str, Any]) -> None:
    """End one rank in the middle."""
    cached = bw.transform(model_of("tensor"), capture="opaque", process_group=dist.group.WORLD, **settings)
    with torch.no_grad():
        for step in range(STEPS):
            if step == 5 and dist.get_rank() == 1:
                os._exit(1)
            cached(*inputs(step, STEPS))


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_with_an_error(tmp_path: Path) -> None:
    first, second = run(dying, 2, tmp_path, {**MEASURED, "threshold": 0})
    assert second is None
    assert isinstance(first, RuntimeError), first


def test_a_process_group_needs_modules() -> None:
    with pytest.raises(bw.ConfigError, match=r'process_group requires capture="opaque", got capture=\'whole\''):
        bw.transform(model_of("tensor"), MASKED, process_group=object())  # type: ignore[call-overload]
