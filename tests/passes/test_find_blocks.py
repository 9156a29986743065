"""find_blocks: the blocks of the main stacks, in execution order; everything else with the reason."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from torch import Tensor, nn

import bwcache_compile as bw
from bwcache_compile.ir.dataflow import DataFlow
from bwcache_compile.ir.plan import BlockSearch, Rejection
from bwcache_compile.passes import canonicalize, find_blocks
from tests.models import Block, Casting, Functional, Growing, Interleaved, OddMiddle, OneStream, Refined, Tiny, TwoStream, captured
from tests.passes.helpers import models, text


def search(model: Tiny) -> BlockSearch:
    return find_blocks(canonicalize(captured(model)).program)


def test_one_stack() -> None:
    found = search(OneStream(depth=2))
    assert_expected_inline(str(found), """blocks.0 .. blocks.1: 2 x Block""")
    assert_expected_inline(
        "\n".join(f"{b.name}: {' '.join(b.nodes)} -> {b.feature}" for b in found.blocks),
        """\
blocks.0: mul linear_2 gelu linear_3 add -> add
blocks.1: mul_1 linear_4 gelu_1 linear_5 add_1 -> add_1""",
    )


def test_two_streams() -> None:
    found = search(TwoStream(double=2, single=3))
    assert_expected_inline(
        str(found),
        """\
double_blocks.0 .. double_blocks.1: 2 x DoubleBlock
single_blocks.0 .. single_blocks.2: 3 x Block""",
    )
    assert_expected_inline(
        "\n".join(f"{b.name}: {' '.join(b.live_outs)} -> {b.feature}" for b in found.blocks),
        """\
double_blocks.0: add_1 add_3 -> add_1
double_blocks.1: add_5 add_7 -> add_5
single_blocks.0: add_8 -> add_8
single_blocks.1: add_9 -> add_9
single_blocks.2: add_10 -> add_10""",
    )
    assert found.token_range == (2, 8), "the head takes the six video rows behind the two text rows"


def test_blocks_in_turn() -> None:
    assert [block.name for block in search(Interleaved(depth=2)).blocks] == ["spatial.0", "temporal.0", "spatial.1", "temporal.1"]


def test_structure_alone() -> None:
    assert_expected_inline(str(search(Functional(depth=3))), """repeat0.0 .. repeat0.2: 3 x repeated operators""")


def test_casts_do_not_hide_blocks() -> None:
    assert [block.name for block in search(Casting(depth=3)).blocks] == ["blocks.0", "blocks.1", "blocks.2"]


def test_one_class_may_differ_inside() -> None:
    assert_expected_inline(str(search(OddMiddle())), """blocks.0 .. blocks.2: 3 x Block""")


def test_refiner_stays_out() -> None:
    assert_expected_inline(
        str(search(Refined(refiners=2, depth=3))),
        """\
blocks.0 .. blocks.2: 3 x Block
not cached: refiner (2 modules): its stream is not the one that reaches the output""",
    )


def test_two_repetitions_without_names_are_enough_where_they_are_most_of_the_model() -> None:
    assert_expected_inline(str(search(Functional(depth=2))), """repeat0.0 .. repeat0.1: 2 x repeated operators""")
    assert search(Functional(depth=1)) == BlockSearch((), ())


class SideBySide(OneStream):
    """Equal modules that do not follow one another: experts, not blocks."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, temb = self.patch(x), self.embed(t)
        outputs = [block(x, temb) for block in self.blocks]
        return self.head(sum(outputs))


def test_modules_side_by_side_are_refused() -> None:
    assert search(SideBySide(depth=2)) == BlockSearch((), (Rejection("blocks", 2, "blocks.1 does not depend on blocks.0"),))


def test_growing_streams_are_refused() -> None:
    reason = "blocks.1 has another output size (`add_1` f32[1, 12, 8]) than blocks.0 (`add` f32[1, 6, 8])"
    assert search(Growing(depth=3)) == BlockSearch((), (Rejection("blocks", 3, reason),))


class LonelyLinear(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return x + self.inner(x * temb)


class Mixed(OneStream):
    def __init__(self) -> None:
        super().__init__(depth=2)
        self.blocks = nn.ModuleList([Block(8), LonelyLinear(8), Block(8)])


def test_a_lone_projection_is_no_block_but_may_run_between_blocks() -> None:
    assert_expected_inline(
        str(search(Mixed())),
        """\
blocks.0 .. blocks.2: 2 x Block
not cached: blocks (1 modules): blocks.1 has fewer than two matrix products (`linear_4` f32[1, 6, 8])""",
    )


@pytest.mark.parametrize("model", [OneStream(), TwoStream(), Functional(), Interleaved()], ids=lambda m: type(m).__name__)
def test_the_graph_is_left_alone(model: Tiny) -> None:
    program = canonicalize(captured(model)).program
    before = text(program)
    first, second = find_blocks(program), find_blocks(program)
    assert text(program) == before
    assert first == second


@settings(max_examples=12, deadline=None)
@given(models())
def test_blocks_are_disjoint_ordered_convex(model: Tiny) -> None:
    program = canonicalize(captured(model)).program
    blocks = find_blocks(program).blocks
    flow = DataFlow(program.compute.graph)
    named = {node.name: node for node in flow.nodes}
    masks = [flow.mask(named[name] for name in block.nodes) for block in blocks]
    assert len(blocks) == sum(len(part) for part in stacks(model))
    for left, right in pairwise(masks):
        assert left & right == 0
        assert left < right, "a later block has later nodes"
        assert flow.before(right) & left, "each block depends on the one before it"
        assert not flow.before(left) & right
    for block, mask in zip(blocks, masks, strict=True):
        between = flow.before(mask) & flow.after(mask) & ~mask
        assert between == 0, f"{block.name} has foreign nodes inside"
        assert block.feature in block.live_outs
        assert set(block.live_outs) <= set(block.nodes)


def stacks(model: Tiny) -> list[range | nn.ModuleList]:
    """Return what must be found in a model: its main stacks."""
    if isinstance(model, Functional):
        return [range((len(model.weights) - 2) // 2)]
    return [module for name, module in model.named_children() if isinstance(module, nn.ModuleList) and name != "refiner"]


class FusedLayer(nn.TransformerEncoderLayer):
    """torch's own encoder layer as the one operator that it is where no gradient is needed."""

    def forward(self, src: Tensor) -> Tensor:
        attention, *parts = self.self_attn, self.norm1, self.norm2, self.linear1, self.linear2
        out = attention.out_proj
        weights = [weight for part in parts for weight in (part.weight, part.bias)]
        own = (attention.in_proj_weight, attention.in_proj_bias, out.weight, out.bias)
        return torch._transformer_encoder_layer_fwd(src, 8, 2, *own, False, False, 1e-5, *weights)


class FusedLayers(OneStream):
    def __init__(self) -> None:
        super().__init__(0)
        self.blocks = nn.ModuleList(FusedLayer(8, 2, 16, batch_first=True) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.patch(x) + self.embed(t)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_fused_encoder_layers_are_blocks() -> None:
    found = search(FusedLayers())
    assert str(found) == "blocks.0 .. blocks.2: 3 x FusedLayer"
    assert [len(block.nodes) for block in found.blocks] == [1, 1, 1]


@pytest.mark.parametrize("called", [False, True], ids=["inlined", "both modules called"])
def test_compiled_blocks_are_listed_once_by_the_path_they_were_assigned_to(called: bool) -> None:
    model = OneStream(depth=3)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend="eager")
    program = canonicalize(captured(model)).program
    path = "blocks.0"
    for node in program.compute.graph.nodes if called else ():
        stack = node.meta.get("nn_module_stack", {})
        inner = next((str(p).rpartition(".")[0] for p, _ in stack.values() if "_orig_mod" in str(p)), "")
        path = inner.removesuffix("._orig_mod") or path
        if inner or node.name.startswith(("mul", "gelu", "add")):
            wrapped = {
                path: (path, "torch._dynamo.eval_frame.OptimizedModule"),
                f"{path}._orig_mod": (f"{path}._orig_mod", "tests.models.Block"),
            }
            node.meta["nn_module_stack"] = {**wrapped, **stack}
    assert str(find_blocks(program)) == f"blocks.0 .. blocks.2: 3 x {'Block' if called else 'modules'}"


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).tanh())


class NothingRepeats(OneStream):
    """Stages, lone modules, and a list of single projections: candidates that are passed over one by one."""

    def __init__(self) -> None:
        super().__init__(0)
        self.trunk, self.mixers = Experts(), nn.ModuleList(LonelyLinear(8) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, temb = self.trunk(self.patch(x)), self.embed(t)
        for mixer in self.mixers:
            x = mixer(x, temb)
        return self.head(x)


def test_candidates_that_are_passed_over_are_named_where_nothing_is_found() -> None:
    assert_expected_inline(
        "\n".join(f"{r.stack} ({r.count}): {r.reason}" for r in search(NothingRepeats()).rejections),
        """\
mixers (2): mixers.0 has fewer than two matrix products (`linear_4` f32[1, 6, 8])
trunk (1): trunk is a single module whose class is not repeated elsewhere""",
    )


class Pairs(nn.Module):
    """Two modules a layer in a list, which is never called itself."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(4, width), nn.Linear(width, 4)
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.Linear(width, width), nn.Sequential(nn.Linear(width, 16), nn.Linear(16, width))]) for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.into(x)
        for mixing, feed_forward in self.layers:  # type: ignore[misc]
            x = x + mixing(x)
            x = x + feed_forward(x)
        out: torch.Tensor = self.out(x)
        return out


def test_blocks_are_named_by_the_modules_that_are_called() -> None:
    model, inputs = Pairs().eval(), (torch.ones(1, 6, 4),)
    names = [f"layers.{i}.0+layers.{i}.1" for i in range(3)]
    search = bw.find_blocks(model, example_args=inputs)
    assert [(block.name, block.module_type) for block in search.blocks] == [(name, "Linear+Sequential") for name in names]
    for chosen in (names[:2], ["layers.0", "layers.1"]):
        assert [block.name for block in bw.find_blocks(model, blocks=chosen, example_args=inputs).blocks] == names[:2]
