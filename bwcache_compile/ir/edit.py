"""Edit graphs: add inputs, read and write cache slots, compute sizes, and insert calls of traced functions."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import SymInt, Tensor, nn
from torch.fx import Graph, GraphModule, Node

from bwcache_compile.errors import ConfigError
from bwcache_compile.ir.dataflow import DataFlow
from bwcache_compile.ir.graph_text import format_value
from bwcache_compile.ir.layout import in_order
from bwcache_compile.ir.plan import CacheSlot
from bwcache_compile.ir.program import OURS, ModelProgram
from bwcache_compile.ir.sizes import Size, Symbol, hint_shape, size_of
from bwcache_compile.ir.torch_compat import FakeTensor, FakeTensorMode, make_fx
from bwcache_compile.ir.tracing import tracing
from bwcache_compile.size_expressions import evaluate, evaluated, names_in

CACHE = f"{OURS}cache"
"""Path of the buffers that stand for the slots until `lift_cache_state`."""

ROLE = "bwcache_role"
"""Key in the `meta` of nodes that passes insert."""

_SIZE = "size: "


def fake_mode(graph: Graph) -> FakeTensorMode:
    """Return the FakeTensorMode of a graph's dynamic sizes; a new one if it has none."""
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, FakeTensor) and any(isinstance(size, SymInt) for size in value.shape):
            return value.fake_mode
    return FakeTensorMode()


def fake(shape: Sequence[int | SymInt], dtype: torch.dtype, device: torch.device, mode: FakeTensorMode | None = None) -> Tensor:
    """Make a tensor without data, to describe a value or to trace with."""
    with mode or FakeTensorMode():
        return torch.empty(tuple(shape), dtype=dtype, device=device)


def size_values(program: ModelProgram) -> dict[str, SymInt]:
    """Return the program's symbols as symbolic ints, by name."""
    sizes = program.signature.sizes
    inputs = program.compute.graph.find_nodes(op="placeholder")
    values = {}
    for symbol in sizes.symbols if sizes else ():
        value = inputs[symbol.position].meta["val"]
        values[symbol.name] = symbol.solve(value if symbol.dimension is None else value.shape[symbol.dimension])
    return values


def slot_value(program: ModelProgram, slot: CacheSlot) -> Tensor:
    """Describe the value of a slot."""
    mode = fake_mode(program.compute.graph)
    with mode:
        return in_order(fake(evaluated(slot.shape, size_values(program)), slot.dtype, program.planned().device, mode), slot.order)


def inserted(graph: Graph, role: str) -> Node:
    """Return the node that a pass inserted for a role (`step`, `region_0`, `change` ...).

    Its name may be another one: the model's own inputs and operators keep theirs.
    """
    return next(node for node in graph.nodes if node.meta.get(ROLE) == role)


def give_role(node: Node, role: str) -> None:
    """Let a node be found by its role; see `inserted`."""
    node.meta[ROLE] = role


def new_input(graph: Graph, name: str, value: Any) -> Node:
    """Add an input at the insertion point, under another name if the model has one of that name."""
    node = graph.placeholder(name)
    node.target = node.name
    node.meta["val"] = value
    return node


def read_slot(program: ModelProgram, slot: CacheSlot) -> Node:
    """Return the node that reads a slot; it is placed before all operators."""
    graph, module = program.compute.graph, program.compute
    if not hasattr(module, CACHE):
        module.add_module(CACHE, nn.Module())
    holder = module.get_submodule(CACHE)
    if slot.name not in dict(holder.named_buffers()):
        holder.register_buffer(slot.name, torch.empty(slot.example, dtype=slot.dtype, device="meta"), persistent=False)
    path = f"{CACHE}.{slot.name}"
    for node in graph.find_nodes(op="get_attr"):
        if node.target == path:
            return node
    inputs = graph.find_nodes(op="placeholder")
    with graph.inserting_after(inputs[-1]):
        node = graph.get_attr(path)
    node.meta["val"] = slot_value(program, slot)
    return node


def write_slot(program: ModelProgram, slot: CacheSlot, value: Node) -> None:
    """Write a slot's next value, at the end of the graph."""
    target = read_slot(program, slot)
    graph = program.compute.graph
    with graph.inserting_before(graph.output_node()):
        node = graph.call_function(torch.ops.aten.copy_.default, (target, value))
    node.meta["val"] = target.meta["val"]


def _symbol_node(graph: Graph, symbol: Symbol) -> Node:
    """Return a node that reads a symbol off an input."""
    source = graph.find_nodes(op="placeholder")[symbol.position]
    if symbol.dimension is None:
        return source
    node = graph.call_function(torch.ops.aten.sym_size.int, (source, symbol.dimension))
    node.meta["val"] = source.meta["val"].shape[symbol.dimension]
    return node


def is_early(node: Node) -> bool:
    """Whether a node stands before all operators on tensors: an input, or a size worked out from inputs."""
    return node.op == "placeholder" or str(node.meta.get(ROLE)).startswith(_SIZE)


def _behind_sizes(graph: Graph) -> Node:
    """Return the first node behind the inputs and the sizes that were worked out there."""
    last: Node = [node for node in graph.nodes if is_early(node)][-1]
    return last.next


def move_early(node: Node) -> None:
    """Move a number that is computed from sizes to the front of the graph, after the sizes."""
    _behind_sizes(node.graph).prepend(node)
    node.meta[ROLE] = f"{_SIZE}{node.name}"


def _arithmetic(graph: Graph, function: Callable[..., Any], operands: Sequence[Node]) -> Node:
    """Insert integer arithmetic on sizes behind the inputs."""
    traced = as_graph(function, [node.meta["val"] for node in operands])
    copies: dict[Node, Node] = dict(zip(traced.graph.find_nodes(op="placeholder"), operands, strict=True))
    with graph.inserting_before(_behind_sizes(graph)):
        made = graph.graph_copy(traced.graph, copies)
    assert isinstance(made, Node)
    known = {node.meta[ROLE]: node for node in graph.nodes if node.op != "placeholder" and is_early(node)}
    for copy in [copy for copy in copies.values() if not is_early(copy)]:
        copy.meta[ROLE] = f"{_SIZE}{size_of(copy.meta['val'])}"
        same = known.setdefault(copy.meta[ROLE], copy)
        if same is not copy and copy is not made:
            copy.replace_all_uses_with(same)
            graph.erase_node(copy)
    return made


def size_node(program: ModelProgram, size: Size) -> Node | int:
    """Return a node that holds a size, standing behind the inputs and made once for each size; an int stands for itself."""
    graph, role = program.compute.graph, f"{_SIZE}{size}"
    found: Node | None = next((node for node in graph.nodes if node.meta.get(ROLE) == role), None)
    if isinstance(size, int):
        return size
    if found is not None:
        return found
    symbols = {symbol.name: symbol for symbol in program.signature.sizes.symbols} if program.signature.sizes else {}
    if size in symbols:
        with graph.inserting_before(_behind_sizes(graph)):
            node = _symbol_node(graph, symbols[size])
        if not symbols[size].is_read:
            node = _arithmetic(graph, symbols[size].solve, [node])
    else:
        names = [name for name in names_in(size) if name in symbols]
        operands = [node for node in (size_node(program, name) for name in names) if isinstance(node, Node)]
        node = _arithmetic(graph, lambda *values: evaluate(size, dict(zip(names, values, strict=True))), operands)
    node.meta[ROLE] = role
    return node


def as_graph(function: Callable[..., Any], examples: Sequence[Tensor | SymInt], mode: FakeTensorMode | None = None) -> GraphModule:
    """Trace a pure tensor function into a graph, with the layouts, dtypes and device of the examples; dynamic sizes stay open."""

    def like(example: Tensor | SymInt) -> Any:
        if not isinstance(example, Tensor):
            return example
        return torch.empty_strided(example.shape, example.stride(), dtype=example.dtype, device=example.device)

    with tracing(), mode or FakeTensorMode():
        inputs = [like(example) for example in examples]
        traced = make_fx(function, tracing_mode="real")(*inputs)
    for node in traced.graph.nodes:
        node.meta.pop("tensor_meta", None)
        node.meta.pop("stack_trace", None)
    return traced


def call_graph(module: GraphModule, name: str, inner: GraphModule, operands: Sequence[Node], role: str | None = None) -> Node:
    """Insert a call of a graph; its results are read with `result`. The caller chooses the insertion point."""
    module.add_submodule(OURS + name, inner)
    node = module.graph.create_node("call_module", OURS + name, tuple(operands), name=role or name)
    node.meta[ROLE] = role or name
    returned = inner.graph.output_node().args[0]
    if isinstance(returned, (list, tuple)):
        node.meta["val"] = tuple(item.meta.get("val") for item in returned)  # type: ignore[union-attr]
    else:
        node.meta["val"] = returned.meta.get("val")  # type: ignore[union-attr]
    return node


def call_traced(module: GraphModule, name: str, function: Callable[..., Any], operands: Sequence[Node], role: str | None = None) -> Node:
    """Insert a call of a pure tensor function, traced for these operands."""
    traced = as_graph(function, [node.meta["val"] for node in operands], fake_mode(module.graph))
    return call_graph(module, name, traced, operands, role)


def call_pure(module: GraphModule, name: str, function: Callable[..., Any], operands: Sequence[Node]) -> list[Node]:
    """Insert a call of a pure tensor function and return its results; one that is an operand is that operand's node.

    No result of the call shares storage with an operand. There is no call where every result is an operand.
    """
    traced = as_graph(function, [node.meta["val"] for node in operands], fake_mode(module.graph))
    given = dict(zip(traced.graph.find_nodes(op="placeholder"), operands, strict=True))
    output = traced.graph.output_node()
    returned: Any = output.args[0]
    results = list(returned) if isinstance(returned, (list, tuple)) else [returned]
    made = [node for node in results if node not in given]
    if made:
        roots = DataFlow(traced.graph).roots
        with traced.graph.inserting_before(output):
            own = {node: _copied(node) if any(root.op != "call_function" for root in roots[node]) else node for node in made}
        output.args = (own[made[0]] if len(made) == 1 else tuple(own[node] for node in made),)
        traced.recompile()
        call = call_graph(module, name, traced, operands)
        anchor, nodes = call, [call]
        if len(made) > 1:
            nodes = []
            for i in range(len(made)):
                with module.graph.inserting_after(anchor):
                    anchor = result(call, i, f"{name}_{i}")
                nodes.append(anchor)
        given |= dict(zip(made, nodes, strict=True))
    return [given[node] for node in results]


def check_results(what: str, results: Sequence[Node], expected: Sequence[Tensor]) -> None:
    """Check what a function of a policy, an indicator or a way of reusing returned.

    Raises:
        ConfigError: Another number of tensors, or tensors of another shape or dtype.
    """
    got, wanted = [node.meta["val"] for node in results], list(expected)
    if [(value.dtype, hint_shape(value)) for value in got] != [(value.dtype, hint_shape(value)) for value in wanted]:
        shown = [", ".join(map(format_value, values)) for values in (got, wanted)]
        raise ConfigError(f"{what} must return {shown[1]}, got {shown[0]}.")


def _copied(node: Node) -> Node:
    copy = node.graph.call_function(torch.ops.aten.clone.default, (node,))
    copy.meta["val"] = node.meta["val"]
    return copy


def result(call: Node, index: int, name: str) -> Node:
    """Read one result of a call, under a name of its own."""
    graph = call.graph
    node = graph.create_node("call_function", operator.getitem, (call, index), name=name)
    node.meta |= {"val": call.meta["val"][index], ROLE: name}
    return node
