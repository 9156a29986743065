"""Guidance branches on one dimension of a mesh, the parts of the sequence on the other: four ranks run one step of one video."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import bwcache_compile as bw
from tests.distributed.models import Inputs, Ulysses, inputs
from tests.distributed.ranks import run

STEPS = 30
MEASURED: dict[str, Any] = {"policy": "schedule", "threshold": 0.2, "reuse_interval": 2, "num_steps": STEPS, "indicator_tokens": "all"}
SETTINGS: dict[str, dict[str, Any]] = {
    "measured": MEASURED,
    "apart": MEASURED,
    "sampled": {**MEASURED, "indicator_tokens": 7},
    "masked": {"policy": "static", "steps_mask": tuple(int(step > 1 and step % 3 != 0) for step in range(STEPS))},
}


@dataclasses.dataclass(frozen=True)
class Done:
    """What a rank did: its outputs, which steps it computed, and the collectives of each step over the group that decides."""

    outputs: list[Tensor]
    computed: list[bool]
    reductions: list[int]


def branch(step: int, number: int) -> Inputs:
    """Return the inputs of a guidance branch; the second changes faster."""
    x, t = inputs(step, STEPS, ["cond", "uncond"][number])
    return x * (1 + step * number), t


def generate(settings: str, capture: str, backend: str) -> Done:
    """Run this rank's part of the sequence of its guidance branch. The ranks of all branches decide together, or each for itself."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("guidance", "sequence"))
    sequence = mesh.get_group("sequence")
    everyone = sequence if settings == "apart" else dist.new_group()
    number, part = mesh.get_local_rank("guidance"), mesh.get_local_rank("sequence")
    parts = sequence if settings == "sampled" else None
    model = Ulysses(sequence).eval().requires_grad_(False)
    cached: Any = bw.transform(model, capture=capture, process_group=everyone, sequence_group=parts, **SETTINGS[settings])  # type: ignore[call-overload]
    outputs, reductions = [], []
    for step in range(STEPS):
        x, t = branch(step, number)
        before = everyone._get_sequence_number_for_group()
        with torch.no_grad():
            mine = cached(x.chunk(2, dim=1)[part].contiguous(), t).contiguous()
        reductions.append(everyone._get_sequence_number_for_group() - before)
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine, group=sequence)
        outputs.append(torch.cat(both, dim=1))
        if step == 0 and backend:
            cached.compile(backend=backend)
    return Done(outputs, [record.computed for record in cached.report().contexts["default"].steps], reductions)


def generate_all(cases: list[tuple[str, str, str]]) -> list[Done]:
    """Run generations one after the other."""
    return [generate(*case) for case in cases]


def alone(settings: str, numbers: tuple[int, ...]) -> Done:
    """Run a generation in one process that batches branches."""
    cached: Any = bw.transform(Ulysses().eval(), **SETTINGS[settings])
    with torch.no_grad():
        outputs = [cached(*map(torch.cat, zip(*(branch(step, number) for number in numbers), strict=True))) for step in range(STEPS)]
    return Done(outputs, [record.computed for record in cached.report().contexts["default"].steps], [])


CASES = [
    *((settings, capture, "") for settings in ("measured", "masked") for capture in ("whole", "region", "opaque")),
    ("sampled", "whole", ""),
    *(("apart", capture, "") for capture in ("whole", "opaque")),
    ("measured", "whole", "aot_eager"),
    ("measured", "region", "aot_eager"),
]


@pytest.mark.slow
@pytest.mark.parametrize("cases", [CASES, [("measured", "whole", "inductor")]], ids=["all", "inductor"])
def test_guidance_and_sequence_on_ranks_of_their_own(cases: list[tuple[str, str, str]], tmp_path: Path) -> None:
    ranks = run(generate_all, 4, tmp_path, cases)
    together, apart = [alone("measured", (0, 1))] * 2, [alone("apart", (number,)) for number in (0, 1)]
    wanted = {"measured": together, "masked": [alone("masked", (0, 1))] * 2, "apart": apart}
    assert apart[0].computed != apart[1].computed
    for number, case in enumerate(cases):
        for rank, done in enumerate(ranks):
            assert isinstance(done, list), (done, getattr(done, "__notes__", ""))
            mine, settings = done[number], case[0]
            # Inductor sums in another order, and the sampler carries the difference through 30 steps
            rtol = 5e-4 if case[2] == "inductor" else 1e-4
            assert 0 < sum(mine.computed) < STEPS
            if settings != "apart":
                assert mine.computed == ranks[0][number].computed, case
                counted = [int(computed and settings != "masked") for computed in mine.computed]
                assert mine.reductions[1:] == counted[1:], f"{case}: one a computed step, none a reused one"
            if settings != "sampled":  # which tokens of a batch are measured depends on the batch
                want = wanted[settings][rank // 2]
                assert mine.computed == want.computed, case
                for out, both in zip(mine.outputs, want.outputs, strict=True):
                    expected = both if settings == "apart" else both[rank // 2][None]
                    torch.testing.assert_close(out, expected, rtol=rtol, atol=1e-5)


def misused() -> list[str]:
    """Return what is said of groups whose ranks would wait for one another."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("guidance", "sequence"))
    guidance, sequence = mesh.get_group("guidance"), mesh.get_group("sequence")
    x, t = inputs(0, STEPS)
    example = x.chunk(2, dim=1)[mesh.get_local_rank("sequence")].contiguous(), t
    said = []
    for capture, groups in (
        ("whole", (guidance, sequence)),
        ("whole", (sequence, dist.group.WORLD)),
        ("whole", (guidance, None)),
        ("region", (guidance, None)),
    ):
        with pytest.raises(bw.ConfigError) as caught:
            bw.transform(  # type: ignore[call-overload]
                Ulysses(sequence).eval(), MEASURED, capture=capture, process_group=groups[0], sequence_group=groups[1], example_args=example
            )
        said.append(str(caught.value))
    return said


@pytest.mark.slow
def test_ranks_that_communicate_decide_together(tmp_path: Path) -> None:
    for rank, said in enumerate(run(misused, 4, tmp_path)):
        assert isinstance(said, list), (said, getattr(said, "__notes__", ""))
        outside = "is in sequence_group and not in process_group: the ranks of one sequence decide together. Pass a process_group of all"
        assert said[0].startswith(f"rank {rank ^ 1} {outside}")
        assert said[1].startswith(f"rank {2 if rank < 2 else 0} {outside}")
        for text, name in zip(said[2:], ("Ulysses", "Stack"), strict=True):
            assert text.startswith(f"the blocks of {name} communicate with ranks that are not in process_group (`all_to_all_single")
