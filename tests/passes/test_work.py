"""The share of work that a reused step skips: counted by hand, printed by the plan, warned of where it is small."""

from __future__ import annotations

import warnings

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.nn import functional

import bwcache_compile as bw
from bwcache_compile.errors import CacheWarning
from bwcache_compile.ir.plan import CachePlan
from bwcache_compile.passes._work import multiply_adds
from tests.models import Block, OneStream, Refined, Tiny, captured
from tests.passes.helpers import folded, planned


def plan(model: Tiny, **settings: object) -> CachePlan:
    return planned(model, bw.CacheConfig(**{"num_steps": 4, **settings})).planned()


class Operators(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(4, 5), nn.Conv1d(6, 8, 3, padding=1, groups=2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = self.linear(x)  # 6 tokens: 6 * 4 * 5
        y = y @ y.transpose(1, 2)  # 6 * 5 * 6
        y = torch.einsum("bij,bjk->bik", y, x)  # 6 * 6 * 4
        y = self.conv(y)  # 8 channels, 4 places, 3 inputs of a group, kernel of 3
        return functional.scaled_dot_product_attention(y, y[:, :3], y[:, :3])  # 8 queries, 3 keys, 4 + 4 channels


def test_multiply_adds() -> None:
    program = captured(Operators())
    counts = [multiply_adds(node, program.compute) for node in program.compute.graph.nodes]
    assert [count for count in counts if count] == [120, 180, 144, 8 * 4 * 3 * 3, 8 * 3 * 8]


def test_the_plan_prints_the_share() -> None:
    made = plan(OneStream(depth=3, width=8))
    blocks, outside = 3 * 2 * 6 * 8 * 8, 6 * 8 * 4  # patch and time feed the blocks alone; the head runs
    assert made.work.cached == pytest.approx(1 - outside / (blocks + 2 * outside + 8))
    assert str(made).splitlines()[1] == (
        "92.9% of the work is skipped on a reused step (multiply-adds of matrix products, convolutions and attention)"
    )
    assert made.work.warning("OneStream") is None


def test_blocks_at_the_ends_are_the_users_choice() -> None:
    whole, part = plan(OneStream(depth=4), compute_last=0).work, plan(OneStream(depth=4), compute_last=3).work
    assert part.cached < 0.3 < 0.9 < whole.cached
    assert part.outside == pytest.approx(whole.outside, abs=0.01), "the embedding of the time"
    assert part.warning("OneStream") is None


def test_a_residual_needs_what_it_is_added_to() -> None:
    assert plan(OneStream(width=256), reuse="residual").work.cached < plan(OneStream(width=256), reuse="output").work.cached


def test_stacks_that_are_not_cached_are_listed() -> None:
    (part,) = plan(Refined(refiners=2, depth=3)).work.stacks
    assert (part.name, part.modules, part.reused) == ("refiner", 2, 0)
    assert str(part) == (
        f"refiner (2 modules, {part.share:.0%} of the work that a reused step skips too) is not cached:"
        " its stream is not the one that reaches the output"
    )


class Decoded(OneStream):
    """A decoder of another size behind the blocks: half of the work."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.decoder = nn.ModuleList(Block(4, inner=32) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = super().forward(x, t)
        for block in self.decoder:
            x = block(x, t.view(-1, 1, 1)).repeat_interleave(2, dim=1)
        return x


def test_a_small_share_is_warned_of_once_per_program() -> None:
    model = Decoded().eval()
    cached = bw.transform(model, bw.CacheConfig(num_steps=4))
    with torch.no_grad():
        with pytest.warns(CacheWarning, match="still runs") as caught:
            cached(*model.example())
        cached(*model.example(step=1))
    assert_expected_inline(
        folded(str(caught[0].message)),
        """\
a reused step of Decoded still runs 73% of the work (multiply-adds of matrix products, convolutions and attention)
outside the cached blocks:
  decoder (2 modules, 71% of the work) is not cached: decoder.1 has another output size (`add_3` f32[1, 12, 4]) than
decoder.0 (`add_2` f32[1, 6, 4])
  head (3% of the work) is not cached: it is not a stack of repeated blocks
  Pass blocks=["<path of a stack>", ...] to choose what is cached; `print(cached.plan)` lists every stack that is not.""",
    )
    assert len(caught) == 1


def test_named_blocks_are_the_users_choice() -> None:
    model = Decoded().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cached = bw.transform(model, bw.CacheConfig(num_steps=4), blocks=["blocks"], example_args=model.example())
    assert cached.plan.work.cached < 0.8
