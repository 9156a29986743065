"""main_stacks: the units that the output's stream runs through, and which value of each is that stream."""

from __future__ import annotations

from bwcache_compile.passes.block_search.accept import accepted_stacks
from bwcache_compile.passes.block_search.main_stacks import features, main_units
from bwcache_compile.passes.block_search.stacks import Unit
from tests.passes.searched import Searched, searched


def chosen(model: Searched) -> list[Unit]:
    accepted, _ = accepted_stacks(model.graph, model.flow, model.streams)
    return main_units(accepted, model.flow, model.streams)


def test_refiners_of_the_text_stay_out() -> None:
    assert [unit.name for unit in chosen(searched("Refined"))] == ["blocks.0", "blocks.1", "blocks.2"]


def test_stacks_in_a_row_are_all_in_and_in_order() -> None:
    names = [unit.name for unit in chosen(searched("TwoStream"))]
    assert names == ["double_blocks.0", "double_blocks.1", "single_blocks.0", "single_blocks.1"]


def test_without_stacks_there_are_no_units() -> None:
    one = searched("OneStream")
    assert main_units([], one.flow, one.streams) == []


def test_the_feature_is_the_output_of_a_block() -> None:
    one = searched("OneStream")
    units = chosen(one)
    assert features(units, one.graph, one.streams) == ([unit.nodes[-1] for unit in units], None)


def test_of_two_streams_the_feature_is_that_of_the_output_with_the_rows_that_it_takes() -> None:
    model = searched("TwoStream")
    found, rows = features(chosen(model), model.graph, model.streams)
    assert [tuple(node.meta["val"].shape) for node in found] == [(1, 6, 8), (1, 6, 8), (1, 8, 8), (1, 8, 8)]
    assert rows == (2, 8), "the two rows of text in front are not taken"
