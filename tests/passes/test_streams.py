"""streams: what a value continues, which inputs the output's tokens come from, and which rows are needed."""

from __future__ import annotations

from bwcache_compile.passes.block_search.streams import (
    addends,
    continued,
    input_stream,
    is_token_input,
    merged_skip,
    needed_rows,
    operator_name,
    path_ends,
)
from tests.passes.searched import searched


def test_a_sum_keeps_both_of_its_sides_and_a_product_none() -> None:
    first, second, _ = searched("OneStream").units()
    total, down = second.nodes[-1], second.nodes[-2]
    assert operator_name(total) == "add"
    assert set(addends(total)) == {first.nodes[-1], down}
    assert addends(down) == []
    assert addends(second.nodes[0]) == []


def test_a_block_continues_the_stream_of_the_one_before_it() -> None:
    first, second, third = searched("OneStream").units()
    outputs = {unit.nodes[-1] for unit in (first, second)}
    assert continued(third.nodes[-1], outputs) == [second.nodes[-1]]
    assert continued(third.nodes[-2], outputs) == []


def test_the_latents_are_the_input_that_the_output_comes_from() -> None:
    for name in ("OneStream", "TwoStream", "Refined"):
        model = searched(name)
        assert input_stream(model.graph, model.flow) == {model.input("x")}
    model = searched("TwoStream")
    assert is_token_input(model.input("text"))
    assert not is_token_input(model.input("t"))


def test_rows_are_followed_through_a_slice_and_a_concatenation() -> None:
    model = searched("TwoStream")
    needs = needed_rows(model.graph)
    last = model.units("single_blocks")[-1].nodes[-1]
    joined = next(node for node in model.graph.nodes if operator_name(node) == "cat")
    assert needs[last] == needs[joined] == (2, 8)
    text, video = joined.args[0]
    assert text not in needs, "the single blocks work on each token alone, and no output takes the text's"
    assert needs[video] == (0, 6)


def test_a_residual_path_ends_where_the_stream_enters() -> None:
    one = searched("OneStream")
    region = {node for unit in one.units() for node in unit.nodes}
    assert path_ends(one.units()[-1].nodes[-1], region, one.flow) == []
    product = one.units()[0].nodes[-2]
    assert path_ends(product, region, one.flow) == [product]


def test_a_linear_layer_alone_merges_no_skip() -> None:
    assert merged_skip(searched("OneStream").units()[0].nodes[1]) == []
