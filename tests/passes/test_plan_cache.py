"""plan_cache: what is cached, what it takes, and what is refused before anything is rewritten."""

from __future__ import annotations

import re

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import ConfigError, NoBlocksFoundError, UnsupportedGraphError
from bwcache_compile.ir.dataflow import DataFlow
from bwcache_compile.ir.plan import CachePlan, IndicatorProbe
from bwcache_compile.passes import canonicalize, find_blocks, plan_cache
from tests.models import BufferWriter, Growing, InPlaceResidual, Interleaved, OneStream, PostNorm, Tiny, TwoStream, captured
from tests.passes.helpers import folded, models, planned, text


def plan(model: Tiny, **settings: object) -> CachePlan:
    return planned(model, CacheConfig(**{"num_steps": 4, **settings})).planned()


def slots(plan: CachePlan) -> str:
    return "\n".join(f"{s.name}: {s.role} {str(s.dtype).removeprefix('torch.')}{list(s.shape)} = {s.fill}" for s in plan.slots)


def test_one_stream() -> None:
    made = plan(OneStream(width=256), indicator_tokens=2)
    assert_expected_inline(
        str(made),
        """\
3 blocks are skipped on a reused step: blocks.0 .. blocks.2
99.7% of the work is skipped on a reused step (multiply-adds of matrix products, convolutions and attention)
policy schedule, reuse output, 3 blocks measured, one token in 2
state per context: 0.01 MiB = 2.50 hidden states (0.01 MiB outputs, 0.01 MiB indicator); 0.03 MiB while a step computes""",
    )
    assert_expected_inline(
        slots(made),
        """\
output_0: output float32[1, 6, 256] = 0
reference_0: reference float32[3, 256] = 0
reference_1: reference float32[3, 256] = 0
reference_2: reference float32[3, 256] = 0
trigger: trigger int64[1] = -1""",
    )
    assert (made.regions[0].inputs, made.regions[0].outputs) == (("linear", "linear_1"), ("add_2",))


def test_two_streams_measure_what_the_output_takes() -> None:
    made = plan(TwoStream(width=256), indicator_tokens="all")
    assert_expected_inline(
        str(made),
        """\
4 blocks are skipped on a reused step: double_blocks.0 .. single_blocks.1
99.8% of the work is skipped on a reused step (multiply-adds of matrix products, convolutions and attention)
policy schedule, reuse output, 4 blocks measured, every token
state per context: 0.03 MiB = 4.00 hidden states (0.01 MiB outputs, 0.02 MiB indicator); 0.06 MiB while a step computes
note: the indicator measures tokens 2:8, those that the output takes""",
    )
    assert_expected_inline(
        "\n".join(map(str, made.measured)),
        """\
IndicatorProbe(block='double_blocks.0', node='add_1', token_range=None, stride=None)
IndicatorProbe(block='double_blocks.1', node='add_5', token_range=None, stride=None)
IndicatorProbe(block='single_blocks.0', node='add_8', token_range=(2, 8), stride=None)
IndicatorProbe(block='single_blocks.1', node='add_9', token_range=(2, 8), stride=None)""",
    )
    assert [slot.shape for slot in made.slots if slot.role == "reference"] == [(1, 6, 256)] * 4


def test_taylor() -> None:
    made = plan(OneStream(depth=2), reuse="taylor", indicator_tokens="all")
    assert made.time_input == "t"
    assert str(made).splitlines()[-1] == "extrapolates along t, or along the step index while t does not move"
    assert_expected_inline(
        slots(made),
        """\
output_0: output float32[1, 6, 8] = 0
previous_0: previous float32[1, 6, 8] = 0
times: times float32[2, 2] = nan
reference_0: reference float32[1, 6, 8] = 0
reference_1: reference float32[1, 6, 8] = 0
trigger: trigger int64[1] = -1""",
    )


def test_static_measures_nothing() -> None:
    made = plan(OneStream(), policy="static", steps_mask=(0, 1, 0, 1))
    assert made.measured == ()
    assert_expected_inline(slots(made), """output_0: output float32[1, 6, 8] = 0""")


def test_residual_names_its_source() -> None:
    assert plan(OneStream(), reuse="residual").regions[0].sources == {"add_2": "linear"}
    assert plan(Interleaved(), reuse="residual", compute_last=1).regions[0].sources == {"add_2": "reshape"}


def test_compute_first_and_last_shrink_the_region() -> None:
    made = plan(OneStream(depth=4), compute_first=1, compute_last=2)
    assert [block.name for block in made.blocks] == ["blocks.1"]
    assert made.regions[0].nodes == made.blocks[0].nodes
    assert made.regions[0].inputs == ("add", "linear_1")


@pytest.mark.parametrize(("count", "names"), [(1, [4]), (2, [2, 4]), (3, [1, 3, 4]), (9, [0, 1, 2, 3, 4]), ("all", [0, 1, 2, 3, 4])])
def test_measured_blocks_are_spread_and_end_with_the_last(count: int | str, names: list[int]) -> None:
    made = plan(OneStream(depth=5), indicator_blocks=count)
    assert [m.block for m in made.measured] == [f"blocks.{i}" for i in names]


def refused(model: Tiny, error: type[Exception], **settings: object) -> str:
    program = canonicalize(captured(model)).program
    before = text(program)
    with pytest.raises(error) as caught:
        plan_cache(program, find_blocks(program), CacheConfig(**{"num_steps": 4, **settings}))
    assert text(program) == before
    return folded(str(caught.value))


def test_no_blocks() -> None:
    assert_expected_inline(
        refused(Growing(), NoBlocksFoundError),
        """\
no repeated transformer blocks in Growing.
  Nearest candidates, each rejected:
    blocks (3 modules): blocks.1 has another output size (`add_1` f32[1, 12, 8]) than blocks.0 (`add` f32[1, 6, 8]).
  A stack is cached if its modules have the same class or run the same operators, and each one takes the output of the
one before it, with the same number of tokens.
  Pass `blocks=[...]` with the paths of yours, or run `bwcache_compile.find_blocks(model, example_kwargs=...)` to see
every candidate.""",
    )


def test_a_block_that_writes_to_a_buffer() -> None:
    assert_expected_inline(
        refused(BufferWriter(), UnsupportedGraphError),
        """\
BufferWriter cannot be cached: `copy__default` inside the blocks writes to `blocks_0_calls` outside of them. A reused
step would skip that write. Return the value instead.""",
    )


def test_a_block_that_writes_to_its_input() -> None:
    made = plan(InPlaceResidual(), reuse="residual").regions[0]
    assert (made.inputs, made.outputs, made.sources) == (("linear", "linear_1"), ("add_1",), {"add_1": "linear"})


def test_nothing_left_to_cache() -> None:
    message = refused(OneStream(depth=3), ConfigError, compute_first=1, compute_last=2)
    assert message == "compute_first=1 and compute_last=2 leave no block to cache: OneStream has 3 blocks."


def test_residual_of_a_post_norm() -> None:
    assert_expected_inline(
        refused(PostNorm(), ConfigError, reuse="residual"),
        """\
reuse='residual' does not fit PostNorm: it requires that each output of the blocks be an input of the blocks plus a
change, and for `layer_norm_1` f32[1, 6, 8] no such input was found (inputs: linear f32[1, 6, 8], linear_1 f32[1, 1,
8]).
  Followed back through sums and re-arrangements, its residual path ends at `layer_norm_1` of blocks.1.
  Use reuse='output' or 'taylor'.""",
    )


class Square(Interleaved):
    """Three frames of three places: the permute between the blocks keeps the shape and exchanges rows and columns."""

    def example(self, batch: int = 1, step: int = 0) -> tuple[Tensor, ...]:
        x, t = super().example(batch, step)
        return torch.cat([x, x[:, :1]], dim=1), t


def test_residual_of_exchanged_rows_and_columns() -> None:
    region = plan(Square(), reuse="residual").regions[0]
    assert (region.inputs, region.outputs) == (("reshape", "linear_1"), ("add_3",))
    assert region.sources == {"add_3": "reshape_2"}, "the shape of `reshape`, and its rows and columns exchanged"
    assert list(region.arrangements) == ["reshape_1", "permute", "reshape_2"]


class IntegerTime(OneStream):
    def example(self, batch: int = 1, step: int = 0) -> tuple[Tensor, ...]:
        x, t = super().example(batch, step)
        return x, (8 * t).to(torch.int64)

    def embed(self, t: Tensor) -> Tensor:
        return super().embed(t.float())


def test_taylor_counts_steps_where_the_time_is_uncertain() -> None:
    made = plan(IntegerTime(), reuse="taylor")
    assert made.time_input is None
    assert made.notes == (
        "no input is clearly the timestep (the only one of rank 0 or 1, or the only column, in float32), so steps are counted instead",
    )


@settings(max_examples=12, deadline=None)
@given(models(), st.integers(0, 2), st.integers(0, 1), st.sampled_from(["output", "taylor"]), st.sampled_from([1, 2, 7, 1000, "all"]))
def test_plans_add_up(model: Tiny, first: int, last: int, reuse: str, tokens: int | str) -> None:
    program = canonicalize(captured(model)).program
    search = find_blocks(program)
    first = min(first, len(search.blocks) - 1 - last)
    config = CacheConfig(num_steps=4, compute_first=first, compute_last=last, reuse=reuse, indicator_tokens=tokens)
    made = plan_cache(program, search, config)
    flow = DataFlow(program.compute.graph)
    named = {node.name: node for node in flow.nodes}
    region = flow.mask(named[name] for name in made.regions[0].nodes)
    assert made.blocks == search.blocks[first : len(search.blocks) - last]
    assert flow.before(region) & flow.after(region) == region, "the region is convex"
    assert {name for block in made.blocks for name in block.nodes} <= set(made.regions[0].nodes)
    reads = {a for name in made.regions[0].nodes for a in named[name].all_input_nodes if a.op != "get_attr"}
    assert set(made.regions[0].inputs) == {node.name for node in reads} - set(made.regions[0].nodes)
    assert set(made.regions[0].outputs) == {
        n for n in made.regions[0].nodes if any(user.name not in made.regions[0].nodes for user in named[n].users)
    }
    assert [m.node for m in made.measured] == [block.feature for block in made.blocks]
    check_slots(made, {name: node.meta["val"] for name, node in named.items() if "val" in node.meta})


def check_slots(made: CachePlan, values: dict[str, Tensor]) -> None:
    outputs = [slot for slot in made.slots if slot.role == "output"]
    assert [(slot.shape, slot.dtype) for slot in outputs] == [(values[n].shape, values[n].dtype) for n in made.regions[0].outputs]
    assert len([slot for slot in made.slots if slot.role == "previous"]) == (len(outputs) if made.settings.reuse == "taylor" else 0)
    references = [slot for slot in made.slots if slot.role == "reference"]
    assert [slot.shape[-1] for slot in references] == [values[m.node].shape[-1] for m in made.measured]
    assert [torch.Size(slot.shape[:-1]).numel() for slot in references] == [tokens(m, values[m.node]) for m in made.measured]
    assert [slot.name for slot in made.slots if slot.role == "trigger"] == ["trigger"]
    assert len({slot.name for slot in made.slots}) == len(made.slots)
    assert made.state_bytes == sum(slot.bytes for slot in made.slots) == made.transient_bytes // 2


def tokens(measured: IndicatorProbe, value: Tensor) -> int:
    rows = torch.Size(value.shape[:-1]).numel()
    if measured.token_range is not None:
        rows = rows // value.shape[1] * (measured.token_range[1] - measured.token_range[0])
    return rows if measured.stride is None else max(1, rows // measured.stride)


class Counted(OneStream):
    """Cuts the tokens at a length that only a tensor tells."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x[:, : (4 * t).long().tolist()[0]], t)


def test_a_size_that_depends_on_values() -> None:
    message = " ".join(refused(Counted(), UnsupportedGraphError).split())
    place = re.search(r"at (\S+):(\d+), in forward: ", message)
    assert place is not None
    assert place.group(1) == __file__
    assert message.replace(place.group(), "at ...: ") == (
        "Counted cannot be cached: `add` f32[1, u1, 8], which the blocks return, has a size that depends on the "
        'values of a tensor (.item(), .tolist(), indexing by a mask) at ...: "return super().forward(x[:, : (4 * '
        't).long().tolist()[0]], t)" Compute sizes from shapes instead, or pass the mask or the lengths as an input '
        "of at most two dimensions."
    )
