"""isomorphism: whether two units do the same, and where they do not."""

from __future__ import annotations

import dataclasses
import re

from bwcache_compile.passes.block_search.isomorphism import difference, outside_operands
from tests.passes.searched import searched


def test_blocks_of_one_class_and_size_match() -> None:
    first, *others = searched("OneStream").units()
    assert [difference(first, other) for other in others] == [None, None]


def test_another_size_of_weights_is_named() -> None:
    first, second, third = searched("OddMiddle").units()
    found = difference(first, second)
    assert found is not None
    assert re.fullmatch(r"at node `linear_4`: weight is f32\[16, 8\], expected f32\[8, 8\]", found)
    assert difference(first, third) is None


def test_another_operator_another_origin_and_another_number_of_operators_are_named() -> None:
    first, second = searched("OneStream").units()[:2]
    shuffled = dataclasses.replace(second, nodes=(second.nodes[1], second.nodes[0], *second.nodes[2:]))
    assert difference(first, shuffled) == "at node `linear_4`: it runs linear, expected mul"
    assert difference(first, dataclasses.replace(second, nodes=second.nodes[:-1])) == "it runs 4 operators, expected 5"
    wired = dataclasses.replace(first, nodes=(*first.nodes[:3], second.nodes[3], first.nodes[4]))  # the last sum reads the first block's
    assert difference(second, wired) == "at node `linear_5`: operand `gelu_1` has another origin"


def test_operands_from_outside_are_the_stream_and_the_condition() -> None:
    first, second = searched("OneStream").units()[:2]
    stream, condition = outside_operands(second)
    assert stream is first.nodes[-1]
    assert outside_operands(first)[1] is condition
