"""arrange_sources: what residuals are taken from where streams were joined, cut or permuted on the way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import bwcache_compile as bw
from bwcache_compile.passes import Guard
from bwcache_compile.passes.arrange_sources import arrange_sources
from bwcache_compile.testing import assert_graph_diff
from tests.architectures.parts import Model
from tests.architectures.shapes import InTurn
from tests.architectures.stages import Layered, RefinedOnBothSides
from tests.models import Block, OneStream, TwoStream
from tests.passes.helpers import around, planned, text
from tests.reference import Oracle

RESIDUAL = bw.CacheConfig(num_steps=4, reuse="residual")
MASK = (0, 1, 1, 0, 1)


def test_a_stream_that_stays_as_it_is_needs_nothing() -> None:
    program = planned(OneStream(), RESIDUAL)
    before = text(program)
    assert not arrange_sources(program).modified
    assert text(program) == before


class PlacedBlock(Block):
    def forward(self, x: Tensor, temb: Tensor, places: Tensor | None = None) -> Tensor:
        assert places is not None
        return super().forward(x + places, temb)


class PlacesAgain(OneStream):
    """Each block adds an embedding of the places, as Cosmos: of two inputs that are summed, one is the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PlacedBlock(8) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        places, x, temb = self.patch(x.flip(1)), self.patch(x), self.embed(t)
        for block in self.blocks:
            x = block(x, temb, places)
        return self.head(x)


def test_what_is_added_again_and_again_is_no_stream() -> None:
    region = planned(PlacesAgain(), RESIDUAL).planned().regions[0]
    assert (region.inputs, region.sources, region.arrangements) == (("linear_1", "linear", "linear_2"), {"add_5": "linear_1"}, {})


def test_diff() -> None:
    program = planned(TwoStream(), RESIDUAL)
    assert program.planned().regions[0].sources == {"add_9": "cat"}
    assert_graph_diff(
        *around(arrange_sources, program),
        """\
@@ arrange_sources
+cat_1: f32[1, 8, 8] = cat([linear_1, linear], 1)""",
        name="arrange_sources",
    )


@pytest.mark.parametrize("guard", ["host", "graph"])
def test_residuals_of_joined_streams_are_the_oracle(guard: Guard) -> None:
    model = TwoStream().eval()
    config = bw.CacheConfig(policy="static", steps_mask=MASK, reuse="residual")
    cached = bw.transform(model, config, guard=guard)
    blocks = [*model.double_blocks, *model.single_blocks]
    oracle = Oracle(model, blocks, ("text", "x"), config)
    for step in range(len(MASK)):
        inputs = dict(zip(("x", "text", "t"), model.example(step=step), strict=True))
        with torch.no_grad():
            torch.testing.assert_close(cached(**inputs), oracle(**inputs), rtol=1e-6, atol=1e-6)
    assert len(cached.plan.blocks) == len(blocks)


def first(*args: Tensor) -> Tensor:
    return args[0]


def joined(x: Tensor, _: Tensor, words: Tensor) -> Tensor:
    return torch.cat([x, words], dim=1)


@pytest.mark.parametrize(("kind", "source"), [(Layered, first), (RefinedOnBothSides, joined), (InTurn, first)], ids=lambda v: v.__name__)
def test_residuals_through_text_that_joins_and_rows_in_turn(kind: type[Model], source: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model = kind().eval().requires_grad_(False)
    cached = bw.transform(model, bw.CacheConfig(policy="static", steps_mask=MASK, reuse="residual"))
    original, kept = model.trunk, []
    for step, reuse in enumerate(MASK):

        def trunk(*args: Tensor, reuse: int = reuse) -> Tensor:
            if not reuse:
                kept.append(original(*args) - source(*args))
            return source(*args) + kept[-1]

        model.trunk = trunk  # type: ignore[method-assign]
        with torch.no_grad():
            expected = model(*model.inputs(step))
            del model.trunk
            torch.testing.assert_close(cached(*model.inputs(step)), expected, rtol=1e-6, atol=1e-6)
            if reuse:
                assert not torch.allclose(model(*model.inputs(step)), expected, rtol=1e-3, atol=1e-3)


def test_at_another_size() -> None:
    model = TwoStream().eval()
    config = bw.CacheConfig(policy="static", steps_mask=MASK, reuse="residual")
    cached, fixed = bw.transform(model, config, dynamic_shapes="auto", example_args=model.example(batch=2)), bw.transform(model, config)
    for step in range(len(MASK)):
        x, words, t = model.example(batch=3, step=step)
        x, words = torch.cat([x, x + 1], dim=1), torch.cat([words, words - 1], dim=1)
        with torch.no_grad():
            assert torch.equal(cached(x, words, t), fixed(x, words, t))
    assert len(cached.cached_programs) == 1
