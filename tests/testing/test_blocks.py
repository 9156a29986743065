"""assert_blocks: which blocks are missing, which are extra, and why a candidate was turned down."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline

import bwcache_compile as bw
from bwcache_compile.testing import assert_blocks
from tests.models import Functional, Growing, OneStream, Refined, Tiny

NAMES = [f"blocks.{i}" for i in range(3)]


def failing(model: Tiny, expected: list[str]) -> str:
    with pytest.raises(AssertionError) as error:
        assert_blocks(model.eval(), expected, example_args=model.example())
    return str(error.value)


def test_found() -> None:
    model = OneStream().eval()
    assert_blocks(model, NAMES, example_args=model.example())
    assert_blocks(model, NAMES, example_kwargs=dict(zip(("x", "t"), model.example(), strict=True)))
    assert_blocks(torch.export.export(model, model.example()), NAMES)
    cached = bw.transform(model, num_steps=4)
    assert_blocks(cached, NAMES, example_args=model.example())
    assert_blocks(cached, NAMES)
    assert_blocks(Growing().eval(), [], example_args=model.example())


def test_missing_and_extra() -> None:
    assert_expected_inline(
        failing(OneStream(), ["blocks.0", "blocks.1", "block.2"]),
        """\
expected 3 blocks, found 3:
  missing: block.2
  extra: blocks.2
  found: blocks.0, blocks.1, blocks.2""",
    )


def test_another_order() -> None:
    assert_expected_inline(
        failing(OneStream(depth=2), ["blocks.1", "blocks.0"]),
        """\
the blocks run in another order:
  expected: blocks.1, blocks.0
  found: blocks.0, blocks.1""",
    )


def test_the_nearest_candidate_says_why_it_is_not_cached() -> None:
    assert_expected_inline(
        failing(Refined(), ["refiner.0", "refiner.1", *NAMES]),
        """\
expected 5 blocks, found 3:
  missing: refiner.0, refiner.1
  found: blocks.0, blocks.1, blocks.2
  nearest rejected candidate: refiner (2 modules): its stream is not the one that reaches the output""",
    )
    assert "found: none\n  nearest rejected candidate: blocks (3 modules): " in failing(Growing(), NAMES)


def test_without_rejections_nothing_is_made_up() -> None:
    assert failing(Functional(), NAMES).count("\n") >= 2
    with pytest.raises(bw.ConfigError, match="expected must be a list of module paths, got 'blocks'"):
        assert_blocks(OneStream().eval(), "blocks", example_args=OneStream().example())
