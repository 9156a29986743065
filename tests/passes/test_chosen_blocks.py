"""Blocks that the user names: taken as they are where a region can be made of them, refused with the reason elsewhere."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

import bwcache_compile as bw
from bwcache_compile.errors import ConfigError
from bwcache_compile.passes import canonicalize, find_blocks
from tests.models import Growing, Interleaved, OneStream, Refined, Tiny, TwoStream, captured
from tests.passes.helpers import folded
from tests.reference import Oracle


def chosen(model: Tiny, *names: str) -> str:
    found = find_blocks(canonicalize(captured(model)).program, names)
    return " ".join(f"{block.name}({block.stack})" for block in found.blocks)


@pytest.mark.parametrize(
    ("model", "names", "expected"),
    [
        (TwoStream(), ["single_blocks"], "single_blocks.0(single_blocks) single_blocks.1(single_blocks)"),
        (TwoStream(), ["single_blocks.0", "double_blocks.1"], "double_blocks.1(double_blocks.1) single_blocks.0(single_blocks.0)"),
        (Refined(), ["refiner"], "refiner.0(refiner) refiner.1(refiner)"),
        (Growing(), ["blocks", "blocks.1"], "blocks.0(blocks) blocks.1(blocks) blocks.2(blocks)"),
        (OneStream(), ["blocks.1.down"], "blocks.1.down(blocks.1.down)"),
    ],
    ids=["a stack", "blocks", "a stack beside", "a rejected stack", "a part"],
)
def test_names_are_taken_in_execution_order(model: Tiny, names: list[str], expected: str) -> None:
    assert chosen(model, *names) == expected


def refused(model: Tiny, *names: str) -> str:
    with pytest.raises(ConfigError) as caught:
        chosen(model, *names)
    return folded(str(caught.value))


def test_a_name_of_nothing() -> None:
    assert_expected_inline(
        refused(TwoStream(), "transformer_blocks"),
        """\
blocks: 'transformer_blocks' matches no module of TwoStream. Candidates:
    double_blocks (2 modules)
    single_blocks (2 modules)
    repeat0 (2 x repeated operators)
    repeat1 (2 x repeated operators)""",
    )


def test_blocks_within_one_another() -> None:
    assert_expected_inline(
        refused(OneStream(), "blocks", "blocks.1.up"),
        """\
blocks=['blocks', 'blocks.1.up']: blocks.1.up and blocks.1 of OneStream share the operator `linear_4`. Blocks must not
overlap; name either the outer or the inner modules.""",
    )


class SideBySide(OneStream):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, temb = self.patch(x), self.embed(t)
        return self.head(sum(block(x, temb) for block in self.blocks))


def test_blocks_side_by_side() -> None:
    assert_expected_inline(
        refused(SideBySide(depth=2), "blocks"),
        """\
blocks=['blocks']: blocks.1 of SideBySide does not depend on blocks.0, which runs before it. Name consecutive blocks of
one stream.""",
    )


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean()


class Averaging(OneStream):
    def __init__(self) -> None:
        super().__init__()
        self.means = nn.ModuleList([Mean(), Mean()])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x * self.means[0](x) * self.means[1](x), t)


def test_a_module_that_hands_on_no_stream() -> None:
    assert_expected_inline(
        refused(Averaging(), "means"),
        """\
blocks=['means']: means.0 of Averaging has no floating-point output of rank 2 or more that is read later. Name modules
that pass on the hidden state.""",
    )


def test_transform_caches_what_is_named() -> None:
    model = Growing().eval()
    cached = bw.transform(model, bw.CacheConfig(policy="static", steps_mask=(0, 1)), blocks=["blocks"])
    with torch.no_grad():
        first, second = (cached(*model.example(step=step)) for step in range(2))
        assert torch.equal(first, model(*model.example(step=0)))
    assert torch.equal(second, first), "nothing but the blocks' output reaches the end"
    assert [block.name for block in cached.plan.blocks] == ["blocks.0", "blocks.1", "blocks.2"]
    assert set(cached.graph_diff()) >= {"split_region", "whole"}


@pytest.mark.parametrize("blocks", ["blocks", [], [3]])
def test_what_is_no_list_of_names(blocks: object) -> None:
    with pytest.raises(ConfigError) as caught:
        bw.find_blocks(OneStream(), blocks=blocks)  # type: ignore[arg-type]
    assert str(caught.value) == f'blocks must be a list of module paths, such as ["transformer_blocks"], got {blocks!r}.'


@pytest.mark.parametrize(
    ("model", "names", "streams"),
    [
        (TwoStream(), ["double_blocks.1", "single_blocks.0"], ("x", "text")),
        (Interleaved(depth=2), ["temporal.0", "spatial.1"], ("x",)),
    ],
    ids=["two stacks", "in turn"],
)
def test_blocks_at_the_ends_are_computed(model: Tiny, names: list[str], streams: tuple[str, ...]) -> None:
    model.eval()
    config = bw.CacheConfig(policy="static", steps_mask=(0, 1, 1, 0, 1), compute_first=1, compute_last=1)
    cached = bw.transform(model, config)
    oracle = Oracle(model, [model.get_submodule(name) for name in names], streams, config)
    for step in range(5):
        inputs = dict(zip(("x", "text", "t") if "text" in streams else ("x", "t"), model.example(step=step), strict=True))
        with torch.no_grad():
            assert torch.equal(cached(**inputs), oracle(**inputs))
    assert [block.name for block in cached.plan.blocks] == names


def test_exported_programs_need_no_examples_and_no_names() -> None:
    model = TwoStream(double=2, single=3).eval()
    with torch.no_grad():
        exported = torch.export.export(model, model.example())
    assert [block.name for block in bw.find_blocks(exported).blocks][::4] == ["double_blocks.0", "single_blocks.2"]
    assert len(bw.find_blocks(exported, blocks=["single_blocks"]).blocks) == 3
    for node in exported.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    cached = bw.transform(exported.module(), bw.CacheConfig(num_steps=4, threshold=0))
    with torch.no_grad():
        assert torch.equal(cached(*model.example(step=1)), model(*model.example(step=1)))
    assert [block.stack for block in cached.plan.blocks] == ["repeat1"] * 2 + ["repeat0"] * 3
