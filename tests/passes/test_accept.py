"""accept: which candidates are stacks of blocks, and why the others are not."""

from __future__ import annotations

import dataclasses

from bwcache_compile.passes.block_search.accept import accepted_stacks, convex_closure, follows, overlapping
from tests.passes.searched import searched


def test_a_stack_of_equal_blocks_is_accepted() -> None:
    one = searched("OneStream")
    accepted, rejections = accepted_stacks(one.graph, one.flow, one.streams)
    assert [[unit.name for unit in stack.units] for stack in accepted] == [["blocks.0", "blocks.1", "blocks.2"]]
    assert rejections == []


def test_modules_of_growing_outputs_are_rejected_with_their_sizes() -> None:
    model = searched("Growing")
    accepted, (rejection,) = accepted_stacks(model.graph, model.flow, model.streams)
    assert accepted == []
    assert (rejection.stack, rejection.count) == ("blocks", 3)
    assert rejection.reason.startswith("blocks.1 has another output size (`add_1` f32[1, 12, 8]) than blocks.0 (`add` f32[1, 6, 8])")


def test_refiners_are_a_stack_too() -> None:
    """Which stack the output's stream runs through is chosen later."""
    model = searched("Refined")
    accepted, _ = accepted_stacks(model.graph, model.flow, model.streams)
    assert {stack.name: len(stack.units) for stack in accepted} == {"refiner": 2, "blocks": 3}


def test_the_convex_closure_takes_in_what_runs_in_between() -> None:
    one = searched("OneStream")
    unit = one.units()[0]
    ends = dataclasses.replace(unit, nodes=(unit.nodes[0], unit.nodes[-1]))
    assert convex_closure(ends, one.flow) == unit
    assert convex_closure(unit, one.flow) == unit


def test_units_follow_one_another_along_the_data_flow() -> None:
    one = searched("OneStream")
    first, _, last = one.units()
    assert follows(last, first, one.flow)
    assert not follows(first, last, one.flow)


def test_a_shared_operator_is_found() -> None:
    first, second, _ = searched("OneStream").units()
    assert overlapping([first, second]) is None
    wide = dataclasses.replace(second, nodes=(first.nodes[-1], *second.nodes))
    assert overlapping([first, wide]) == (first, wide, first.nodes[-1])
