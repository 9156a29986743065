"""stacks: candidates by module names and by repeating structure, and what is counted of them."""

from __future__ import annotations

import pytest

from bwcache_compile.passes.block_search.stacks import (
    REPEATED,
    attends,
    block_name,
    extent,
    live_outs,
    products,
    streams,
    structural_stacks,
    user_path,
)
from tests.passes.searched import searched


def test_numbered_siblings_are_a_stack() -> None:
    stacks = searched("TwoStream").stacks
    assert [(unit.name, unit.module_type) for unit in stacks["double_blocks"].units] == [
        ("double_blocks.0", "DoubleBlock"),
        ("double_blocks.1", "DoubleBlock"),
    ]
    assert len(stacks["single_blocks"].units) == 2


def test_a_unit_holds_the_operators_of_its_module_in_order() -> None:
    one = searched("OneStream")
    unit = one.units()[1]
    assert [node.name for node in unit.nodes] == ["mul_1", "linear_4", "gelu_1", "linear_5", "add_1"]
    assert products(unit.nodes) == 2
    assert not attends(unit)
    assert block_name(unit) == "blocks.1"
    assert live_outs(unit, one.streams) == [unit.nodes[-1]]


def test_operators_that_repeat_are_a_stack_without_names() -> None:
    graph = searched("OneStream").graph
    (stack,) = structural_stacks(graph, 3, set())
    assert stack.name == "repeat0"
    assert [(unit.name, unit.module_type, len(unit.nodes)) for unit in stack.units] == [(f"repeat0.{i}", REPEATED, 5) for i in range(3)]
    assert structural_stacks(graph, 4, set()) == []
    assert structural_stacks(graph, 3, {node for unit in stack.units for node in unit.nodes}) == []


def test_streams_are_floating_and_of_a_rank() -> None:
    one = searched("OneStream")
    assert one.input("x") in one.streams
    assert one.input("t") not in one.streams
    assert one.input("t") in streams(one.graph, 1)


def test_the_extent_counts_numbers_and_channels() -> None:
    one = searched("OneStream")
    assert extent(one.input("x")) == (24, 4)
    assert extent(one.units()[0].nodes[-1]) == (48, 8)


@pytest.mark.parametrize(("path", "written"), [("blocks.0._orig_mod", "blocks.0"), ("_orig_mod.blocks.0", "blocks.0"), ("head", "head")])
def test_a_path_is_written_without_the_wrappers_of_torch_compile(path: str, written: str) -> None:
    assert user_path(path) == written
