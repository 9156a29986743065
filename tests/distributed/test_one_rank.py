"""What can be said of ranks in one process: the graphs, the settings, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx import GraphModule

import bwcache_compile as bw
from bwcache_compile.ir.ranks import Agreement, Ranks, mean_over_ranks
from bwcache_compile.policies.l1 import relative_change
from bwcache_compile.policies.sampling import sampled_of_part, sampled_tokens
from tests.models import Block, OneStream, noise
from tests.region.test_region import Skipping

STEPS = 10
MEASURED: dict[str, Any] = {"policy": "schedule", "threshold": 0.3, "reuse_interval": 2, "num_steps": STEPS}


@pytest.fixture
def group() -> Iterator[Any]:
    """Yield a process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def model() -> OneStream:
    return OneStream().eval()


def reductions(module: GraphModule) -> int:
    """Count the reductions in a graph and in those that it calls."""
    graphs = [part.graph for part in module.modules() if isinstance(part, GraphModule)]
    return sum(node.target is torch.ops._c10d_functional.all_reduce.default for graph in graphs for node in graph.nodes)


def run(cached: nn.Module) -> list[bool]:
    with torch.no_grad():
        for step in range(STEPS):
            cached(noise("x", step, 1, 6, 4), torch.full((1,), 1 - step / STEPS))
    report: Any = cached
    return [record.computed for record in report.report().contexts["default"].steps]


def test_one_reduction_in_the_graph_of_a_computed_step(group: Any) -> None:
    cached = bw.transform(model(), MEASURED, process_group=group)
    computed = run(cached)
    assert computed == run(bw.transform(model(), MEASURED))
    assert False in computed
    assert cached.program.reuse is not None
    assert (reductions(cached.program.compute), reductions(cached.program.reuse)) == (1, 0)
    assert "with one reduction over the ranks" in str(cached.plan)


def test_no_reduction_with_a_mask(group: Any) -> None:
    mask = tuple(int(step % 2) for step in range(STEPS))
    cached = bw.transform(model(), policy="static", steps_mask=mask, process_group=group)
    assert run(cached) == [not reused for reused in mask]
    assert reductions(cached.program.compute) == 0


def test_settings_and_copies_keep_the_ranks(group: Any) -> None:
    cached = bw.transform(model(), MEASURED, process_group=group, sequence_group=group)
    for other in (copy.deepcopy(cached), cached.with_settings(cached.cache_config.changed(threshold=0.1))):
        assert other.ranks == Ranks(group.group_name, 1, 0)
    run(cached)
    cached.configure(indicator_tokens="all")  # which makes the graphs anew
    run(cached)
    assert reductions(cached.program.compute) == 1


def test_each_stack_of_a_region_reduces_once(group: Any) -> None:
    cached = bw.transform(model(), MEASURED, capture="region", process_group=group)
    assert run(cached) == run(bw.transform(model(), MEASURED))
    assert [reductions(stack.program.compute) for stack in cached.stacks.values()] == [1]


@pytest.mark.parametrize(("batch", "tokens", "stride", "parts"), [(1, 48, 7, 4), (2, 12, 5, 3), (3, 4, 32, 2), (1, 9, 2, 1), (1, 1, 3, 5)])
def test_the_ranks_parts_are_the_tokens_of_the_whole_sequence(batch: int, tokens: int, stride: int, parts: int) -> None:
    places = torch.arange(batch * tokens * parts).view(batch, parts, tokens)
    for block in range(4):
        chosen = [places[:, part].flatten()[sampled_of_part(batch, tokens, stride, block, parts, part)] for part in range(parts)]
        assert torch.equal(torch.cat(chosen).sort().values, sampled_tokens(batch * tokens * parts, stride, block))


def test_what_is_not_measured_on_a_rank_is_left_out(group: Any) -> None:
    new, old = [torch.full((2, 3), 2.0), torch.empty(0, 3)], [torch.full((2, 3), 1.0), torch.empty(0, 3)]
    change = mean_over_ranks(relative_change(new, old), old, Ranks(group.group_name, 2, 1))
    assert change[0] == 1
    assert change[1].isnan(), "measured on no rank"


def test_tokens_of_the_whole_sequence_need_fixed_sizes(group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "of", lambda *_: Ranks(group.group_name, 2, 0))
    with pytest.raises(bw.ConfigError, match=r"indicator_tokens=2 with sequence_group .* takes fixed sizes"):
        bw.transform(model(), MEASURED, indicator_tokens=2, dynamic_shapes="auto", process_group=group, example_args=model().example())


def test_the_arguments_are_checked(group: Any) -> None:
    for given, said in (
        ({"process_group": object()}, "process_group must be a process group of torch.distributed that this process is a member of"),
        ({"sequence_group": group}, "pass process_group, too"),
        ({"process_group": group, "sequence_group": "tokens"}, "sequence_group must be a process group"),
        ({"process_group": group, "guard": "graph"}, "process_group requires guard='host'"),
    ):
        with pytest.raises(bw.ConfigError, match=said):
            bw.transform(model(), MEASURED, **given)  # type: ignore[call-overload]


def test_a_model_that_calls_its_blocks_otherwise_is_an_error_where_there_are_ranks(group: Any) -> None:
    skipping = Skipping().eval()
    cached: Any = bw.transform(skipping, MEASURED, capture="region", process_group=group)
    with torch.no_grad():
        cached(*skipping.example())
        with pytest.raises(bw.StateError, match="not looked for again where there are other ranks"):
            cached(*skipping.example(step=1), skip=True)
        cached.close()
        assert torch.equal(cached(*skipping.example()), skipping(*skipping.example())), "it finds its stacks anew"


@pytest.mark.parametrize(
    ("ends", "wrong", "said"),
    [
        (False, None, ""),
        (False, "no", "on rank 0: no\n  on rank 1: it has another library"),
        (True, "no", "no rank captures it.\n  on rank 0: no\n  on rank 1: it has another library\n  Ranks that run"),
        (True, None, "no rank captures it.\n  on rank 1: it has another library\n  Ranks that run"),
    ],
)
def test_ranks_exchange_how_a_capture_ended(ends: bool, wrong: str | None, said: str, group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    other = (ends, "it has another library" if said else None)
    monkeypatch.setattr("bwcache_compile.ir.ranks.gather_over_ranks", lambda mine, _: {0: mine, 1: other})
    agreement = Agreement("OneStream", Ranks(group.group_name))

    def capture() -> None:
        with agreement.to_the_end():
            if wrong:
                agreement.joint(wrong)

    if ends:
        with pytest.raises(bw.CaptureError) as caught:
            capture()
        assert said in str(caught.value)
    else:
        assert (agreement.joint(wrong) or "") == said


class Summing(Block):
    """Sums over the ranks by itself."""

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        from torch.distributed._functional_collectives import all_reduce

        return all_reduce(super().forward(x, temb), "sum", dist.group.WORLD)


def test_models_of_several_ranks_are_not_exported(group: Any, tmp_path: Path) -> None:
    cached = bw.transform(model(), MEASURED, process_group=group, example_args=model().example())
    with pytest.raises(bw.ConfigError, match="this model decides over the ranks of a process group"):
        bw.export(cached, tmp_path / "bundle", "pt2")
    summing = model()
    summing.blocks = nn.ModuleList(Summing(8) for _ in range(3))
    with pytest.raises(bw.ExportError, match=r"OneStream communicates with other ranks in its forward \(`all_reduce`\)"):
        bw.export(bw.transform(summing, MEASURED, example_args=model().example()), tmp_path / "bundle", "pt2")
    assert not (tmp_path / "bundle").exists()
