"""dataflow: who depends on whom, writes in place included."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from bwcache_compile.ir.dataflow import DataFlow, aliased_arguments, eliminate_dead_code, writes_escape
from tests.models import BufferWriter, Exposed, InPlace, InPlaceResidual, Numbered, OneStream, Tiny, captured

aten = torch.ops.aten


def build(*steps: tuple[str, Callable[..., object], tuple[object, ...]], returns: str) -> dict[str, Node]:
    """Build a graph over the input `x` from (name, operator, arguments); a string argument names a node."""
    graph = Graph()
    nodes = {"x": graph.placeholder("x")}
    for name, target, args in steps:
        nodes[name] = graph.create_node("call_function", target, tuple(nodes[a] if isinstance(a, str) else a for a in args), name=name)
    graph.output((nodes[returns],))
    return nodes


def names(nodes: list[Node]) -> list[str]:
    return [node.name for node in nodes]


def rotary(*, read: bool) -> dict[str, Node]:
    """A fresh tensor that is filled through a view, and read afterwards or not."""
    return build(
        ("empty", aten.empty_like.default, ("x",)),
        ("half", aten.slice.Tensor, ("empty", 0, 0, 1)),
        ("write", aten.copy_.default, ("half", "x")),
        ("total", aten.add.Tensor, ("empty" if read else "x", "x")),
        returns="total",
    )


def test_a_reader_depends_on_the_write_through_a_view() -> None:
    nodes = rotary(read=True)
    flow = DataFlow(nodes["x"].graph)
    assert nodes["total"].all_input_nodes == [nodes["empty"], nodes["x"]], "no plain edge says so"
    assert names(flow.select(flow.ancestors[nodes["total"]])) == ["x", "empty", "half", "write", "total"]
    assert flow.writers == {nodes["empty"]: [nodes["write"]]}


def test_a_write_waits_for_the_readers_of_the_old_value() -> None:
    nodes = build(
        ("fresh", aten.clone.default, ("x",)),
        ("reader", aten.neg.default, ("fresh",)),
        ("write", aten.mul_.Tensor, ("fresh", 2)),
        returns="reader",
    )
    flow = DataFlow(nodes["x"].graph)
    assert flow.ancestors[nodes["write"]] & flow.mask([nodes["reader"]])
    assert not flow.ancestors[nodes["reader"]] & flow.mask([nodes["write"]])
    assert nodes["write"] not in flow.live([nodes["reader"]]), "but the reader does not need it"


def test_a_write_that_is_read_stays_and_one_that_nobody_reads_goes() -> None:
    kept, dropped = rotary(read=True), rotary(read=False)
    assert not eliminate_dead_code(kept["x"].graph)
    assert names(list(kept["x"].graph.nodes)) == ["x", "empty", "half", "write", "total", "output"]
    assert eliminate_dead_code(dropped["x"].graph)
    assert names(list(dropped["x"].graph.nodes)) == ["x", "total", "output"]


def test_a_write_to_an_input_stays() -> None:
    nodes = build(
        ("view", aten.view.default, ("x", [-1])),
        ("write", aten.zero_.default, ("view",)),
        ("out", torch.ops.aten.ones.default, ([1],)),
        returns="out",
    )
    flow = DataFlow(nodes["x"].graph)
    assert flow.outside_writers() == [nodes["write"]]
    assert not eliminate_dead_code(nodes["x"].graph)


@pytest.mark.parametrize(
    ("target", "args", "shared"),
    [
        (aten.slice.Tensor, ("x", 0, 0, 1), True),
        (aten.transpose.int, ("x", 0, 1), True),
        (aten.reshape.default, ("x", [-1]), True),
        (aten.to.dtype, ("x", torch.float32), True),
        (aten.type_as.default, ("x", "x"), True),
        (aten.dropout.default, ("x", 0.0, False), True),
        (aten.add_.Tensor, ("x", 1), True),
        (aten.add.Tensor, ("x", 1), False),
        (aten.clone.default, ("x",), False),
    ],
    ids=lambda value: value.name() if isinstance(value, torch._ops.OpOverload) else "",
)
def test_what_may_share_storage(target: torch._ops.OpOverload, args: tuple[object, ...], shared: bool) -> None:
    nodes = build(("y", target, args), ("z", aten.view.default, ("y", [-1])), returns="z")
    flow = DataFlow(nodes["x"].graph)
    assert flow.roots[nodes["z"]] == frozenset({nodes["x"] if shared else nodes["y"]})
    assert aliased_arguments(nodes["y"])[1] == ([nodes["x"]] if target is aten.add_.Tensor else [])


@pytest.mark.parametrize(
    ("target", "args"),
    [(aten.chunk.default, (2,)), (aten.split.Tensor, (1,)), (aten.split_with_sizes.default, ([1, 1],)), (aten.unbind.int, ())],
    ids=lambda value: value.name() if isinstance(value, torch._ops.OpOverload) else "",
)
def test_parts_of_a_list_share_with_the_whole(target: torch._ops.OpOverload, args: tuple[object, ...]) -> None:
    nodes = build(
        ("parts", target, ("x", *args)),
        ("left", operator.getitem, ("parts", 0)),
        ("write", aten.neg_.default, ("left",)),
        ("late", aten.neg.default, ("x",)),
        returns="late",
    )
    flow = DataFlow(nodes["x"].graph)
    assert flow.roots[nodes["left"]] == frozenset({nodes["x"]})
    assert flow.ancestors[nodes["late"]] & flow.mask([nodes["write"]])


def test_masks_before_and_after() -> None:
    nodes = rotary(read=True)
    flow = DataFlow(nodes["x"].graph)
    write = flow.mask([nodes["write"]])
    assert names(flow.select(flow.before(write))) == ["x", "empty", "half", "write"]
    assert names(flow.select(flow.after(write))) == ["write", "total", "output"]


class Autocast(OneStream):
    """The write is inside the graph that a higher-order operator runs."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            t.mul_(2)
        return super().forward(x, t)


@pytest.mark.parametrize(
    ("model", "escapes"),
    [
        (OneStream(), False),
        (InPlace(), False),
        (Numbered(Exposed()), False),
        (Exposed(), True),
        (InPlaceResidual(), True),
        (BufferWriter(), True),
        (Autocast(), True),
    ],
)
def test_writes_that_escape(model: Tiny, escapes: bool) -> None:
    exported = torch.export.export(model.eval().requires_grad_(False), model.example())
    assert writes_escape(exported.graph_module) is escapes
    written = DataFlow(captured(model).compute.graph).writers
    assert all(root.op != "call_function" for root in written) or not escapes, "the capture is functional"


OPERATIONS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda a, b: a + b,
    lambda a, b: a.mul_(b),
    lambda a, b: a[:2].add_(b[:2]),
    lambda a, b: a.copy_(b),
    lambda a, b: a.view(2, 2).t()[0].mul_(3),
    lambda a, b: a.chunk(2)[1].neg_(),
    lambda a, b: a.clone(),
    lambda a, b: a.view(2, 2).flatten(),
    lambda a, b: a.to(torch.float32),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8), st.integers(0, 9))
def test_what_is_eliminated_is_not_missed(steps: list[tuple[Callable[[Tensor, Tensor], Tensor], int, int]], last: int) -> None:
    def program(x: Tensor) -> Tensor:
        values = [x.clone(), x + 1]
        for operation, left, right in steps:
            a, b = values[left % len(values)], values[right % len(values)]
            result = operation(a, b)
            values.append(result if result.shape == x.shape else a)
        return values[last % len(values)]

    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    traced: GraphModule = make_fx(program)(x)
    wanted = program(x)
    eliminate_dead_code(traced.graph)
    traced.recompile()
    assert torch.equal(traced(x), wanted)
    assert not eliminate_dead_code(traced.graph), "nothing is left to eliminate"
