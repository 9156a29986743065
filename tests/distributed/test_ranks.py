"""Ranks that run one model together compute and reuse the same steps, those of one process."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import bwcache_compile as bw
from tests.distributed.models import KINDS, inputs, one_stream
from tests.distributed.ranks import TIMEOUT, run

STEPS = 30
MEASURED: dict[str, Any] = {"policy": "schedule", "threshold": 0.2, "reuse_interval": 2, "num_steps": STEPS, "indicator_tokens": "all"}
MASK = tuple(int(step > 1 and step % 3 != 0) for step in range(STEPS))
MASKED: dict[str, Any] = {"policy": "static", "steps_mask": MASK}
SAMPLED = {**MEASURED, "indicator_tokens": 7}
CAPTURED = (("ulysses", "whole"), ("ulysses", "region"), ("megatron", "whole"), ("wan_ulysses", "whole"), ("wan_ring", "whole"))


@dataclasses.dataclass(frozen=True)
class Done:
    """What a rank did: its outputs, which steps it computed, and the collectives of each step over the group that decides."""

    outputs: list[Tensor]
    computed: list[bool]
    reductions: list[int]


@dataclasses.dataclass(frozen=True)
class Case:
    """One generation: which model, how it is captured and compiled, and the settings."""

    kind: str
    capture: str
    settings: str = "measured"
    backend: str = ""

    @property
    def config(self) -> dict[str, Any]:
        return {"measured": MEASURED, "masked": MASKED, "sampled": SAMPLED}[self.settings]


def generate(case: Case, group: Any) -> Done:
    """Run a generation on this rank, or without a group in this process. The model's own collectives run in another group."""
    kind = KINDS[case.kind]
    parts = dist.group.WORLD if group is not None and case.settings == "sampled" else None
    cached: Any = bw.transform(kind.model(), capture=case.capture, process_group=group, sequence_group=parts, **case.config)  # type: ignore[call-overload]
    outputs, reductions = [], []
    for step in range(STEPS):
        before = 0 if group is None else group._get_sequence_number_for_group()
        with torch.no_grad():
            out = kind.call(cached, kind.inputs(step, STEPS))
        outputs.append(getattr(out, "full_tensor", lambda out=out: out)().clone())
        reductions.append(0 if group is None else group._get_sequence_number_for_group() - before)
        if step == 0 and case.backend:
            cached.compile(backend=case.backend)
    return Done(outputs, [record.computed for record in cached.report().contexts["default"].steps], reductions)


def generate_all(cases: list[Case]) -> list[Done]:
    """Run generations one after the other."""
    return [generate(case, dist.new_group()) for case in cases]


def check(cases: list[Case], count: int, folder: Path) -> None:
    """Compare generations on several ranks with those of one process."""
    done = run(generate_all, count, folder, cases)
    for number, case in enumerate(cases):
        alone = generate(dataclasses.replace(case, backend=""), None)
        assert 0 < sum(alone.computed) < STEPS, case
        for rank in done:
            assert isinstance(rank, list), (rank, getattr(rank, "__notes__", ""))
            mine = rank[number]
            assert mine.computed == alone.computed, case
            wanted = 0 if case.settings == "masked" else 1
            counted = [wanted * computed for computed in mine.computed]
            assert mine.reductions[1:] == counted[1:], f"{case}: one a computed step, none a reused one"  # the ranks agree at the first
            for step, (out, want) in enumerate(zip(mine.outputs, alone.outputs, strict=True)):
                torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5, msg=lambda text, at=(case, step): f"{at}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["", "aot_eager"])
@pytest.mark.parametrize("count", [2, 4])
def test_captured_ranks_decide_as_one_process(count: int, backend: str, tmp_path: Path) -> None:
    check([Case(*what, backend=backend) for what in CAPTURED], count, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_ranks_decide_as_one_process_where_nothing_is_captured(count: int, tmp_path: Path) -> None:
    cases = [Case(kind, "opaque") for kind in KINDS]
    check([*cases, *(Case(kind, "opaque", backend="aot_eager") for kind in ("dtensor", "fsdp", "fsdp1"))], count, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_ranks_measure_the_tokens_that_one_process_measures(count: int, tmp_path: Path) -> None:
    cases = [Case("ulysses", capture, "sampled") for capture in ("whole", "region", "opaque")]
    check(
        [*cases, Case("ulysses", "whole", "sampled", "aot_eager"), *(Case("wan_ulysses", way, "sampled") for way in ("whole", "region"))],
        count,
        tmp_path,
    )


@pytest.mark.slow
def test_ranks_decide_as_one_process_under_inductor(tmp_path: Path) -> None:
    check([Case("ulysses", "whole", "sampled", "inductor")], 2, tmp_path)


@pytest.mark.slow
def test_a_mask_needs_no_reduction(tmp_path: Path) -> None:
    check([Case(*what, "masked") for what in (*CAPTURED[:3], ("dtensor", "opaque"), ("fsdp", "opaque"), ("fsdp1", "opaque"))], 2, tmp_path)


def refusals() -> list[str]:
    """Return the errors of models that no graph is made of."""
    said = []
    for kind in ("dtensor", "fsdp", "fsdp1", "fsdp1_names"):
        for capture in ("whole", "region"):
            with pytest.raises(bw.ConfigError) as caught:
                bw.transform(KINDS[kind].model(), MEASURED, capture=capture, process_group=dist.group.WORLD)  # type: ignore[call-overload]
            said.append(str(caught.value))
    return said


@pytest.mark.slow
def test_sharded_weights_are_captured_as_opaque_alone(tmp_path: Path) -> None:
    for said in run(refusals, 2, tmp_path):
        assert isinstance(said, list), said
        dtensor = "parameter blocks.0.up.weight of OneStream is a DTensor (tensor parallelism, parallelize_module), and torch.export takes"
        fsdp = "the top module of FSDPOneStream is sharded by fully_shard, whose hooks gather the weights for each forward, and a graph"
        fsdp1 = "the top module of FullyShardedDataParallel is sharded by FullyShardedDataParallel, which gathers the weights in Python"
        starts = [start for start in (dtensor, fsdp, fsdp1, fsdp1) for _ in range(2)]
        assert [text for text, start in zip(said, starts, strict=True) if not text.startswith(start)] == []
        assert all('capture="opaque", process_group=...' in text for text in said)


def guided(step: int, scale: int) -> tuple[Tensor, Tensor]:
    """Return the inputs of a guidance branch; the second changes faster."""
    x, t = inputs(step, STEPS, ["cond", "uncond"][scale])
    return x * (1 + step * scale), t


def branches(capture: str) -> tuple[list[bool], list[bool], list[Tensor]]:
    """Run one guidance branch on each rank, first with decisions apart, then together."""
    decided, outputs = [], []
    for group in (None, dist.group.WORLD):
        cached: Any = bw.transform(one_stream().eval(), capture=capture, process_group=group, **MEASURED)  # type: ignore[call-overload]
        with torch.no_grad():
            outputs = [cached(*guided(step, dist.get_rank())) for step in range(STEPS)]
        decided.append([record.computed for record in cached.report().contexts["default"].steps])
    return decided[0], decided[1], outputs


@pytest.mark.slow
@pytest.mark.parametrize("capture", ["whole", "region", "opaque"])
def test_guidance_branches_on_ranks_of_their_own(capture: str, tmp_path: Path) -> None:
    batched = bw.transform(one_stream().eval(), MEASURED)
    with torch.no_grad():
        alone = [batched(*map(torch.cat, zip(guided(step, 0), guided(step, 1), strict=True))) for step in range(STEPS)]
    decided = [record.computed for record in batched.report().contexts["default"].steps]
    first, second = run(branches, 2, tmp_path, capture)
    assert first[1] == second[1] == decided, "together they decide as one process that batches them"
    assert first[0] != second[0], "apart they decide differently"
    for mine, other, both in zip(first[2], second[2], alone, strict=True):
        torch.testing.assert_close(torch.cat([mine, other]), both, rtol=1e-4, atol=1e-5)


def broken(capture: str) -> list[bool]:
    """Measure something that is not a number on one rank, late in the run."""
    settings = {**MEASURED, "tail": 0.0}
    cached: Any = bw.transform(one_stream().eval(), capture=capture, process_group=dist.group.WORLD, **settings)  # type: ignore[call-overload]
    with torch.no_grad():
        for step in range(STEPS):
            x, t = inputs(step, STEPS)
            cached(x * (float("nan") if dist.get_rank() and step >= STEPS // 2 else 1), t)
    return [record.computed for record in cached.report().contexts["default"].steps]


@pytest.mark.slow
@pytest.mark.parametrize("capture", ["whole", "region", "opaque"])
def test_a_rank_that_measures_no_number_makes_all_compute(capture: str, tmp_path: Path) -> None:
    first, second = run(broken, 2, tmp_path, capture)
    assert first == second
    assert False in first[: STEPS // 2]
    seen = first.index(True, STEPS // 2)  # the first computed step that measures it
    assert all(first[seen:])


def dying(capture: str, backend: str) -> None:
    """End one rank in the middle; the others say how long the step took that failed."""
    settings = {**MEASURED, "threshold": 0}
    cached: Any = bw.transform(one_stream().eval(), capture=capture, process_group=dist.group.WORLD, **settings)  # type: ignore[call-overload]
    with torch.no_grad():
        for step in range(STEPS):
            if step == 5 and dist.get_rank() == 1:
                os._exit(1)
            began = time.monotonic()
            try:
                cached(*inputs(step, STEPS))
            except RuntimeError as error:
                error.seconds = time.monotonic() - began  # type: ignore[attr-defined]
                raise
            if step == 0 and backend:
                cached.compile(backend=backend)


@pytest.mark.slow
@pytest.mark.parametrize(("capture", "backend"), [("whole", ""), ("whole", "aot_eager"), ("region", ""), ("opaque", "")])
def test_a_rank_that_dies_ends_the_others_with_an_error(capture: str, backend: str, tmp_path: Path) -> None:
    first, second = run(dying, 2, tmp_path, capture, backend)
    assert second is None
    assert isinstance(first, RuntimeError), first
    assert first.seconds < TIMEOUT.total_seconds() + 10  # type: ignore[attr-defined]
