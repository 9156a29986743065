"""Make blocks that are alike calls of one graph, so that a compiler generates their code once."""

from __future__ import annotations

import dataclasses
import logging
import operator
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from bwcache_compile.ir.dataflow import DataFlow
from bwcache_compile.ir.edit import call_graph, result
from bwcache_compile.ir.graph_text import called_graphs
from bwcache_compile.ir.outlined_block import BLOCK, OutlinedBlock
from bwcache_compile.ir.program import REGION_MARK, ModelProgram, PassResult

LOGGER = logging.getLogger(__name__)

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A block as it stands in a graph.

    Attributes:
        name: The block's name.
        nodes: Its operators, in order.
        operands: What it reads from outside, in order of first use; a weight counts once.
        key: Equal for blocks that one graph can stand for.
    """

    name: str
    nodes: tuple[Node, ...]
    operands: tuple[Node, ...]
    key: Hashable


def _source(node: Node) -> Hashable:
    """What a node outside stands for: two reads of a weight are one operand."""
    return str(node.target) if node.op == "get_attr" else node


def _described(value: Any) -> Hashable:
    """What a compiled graph is specialized for of an operand."""
    if isinstance(value, Tensor):
        layout = tuple(map(str, value.shape)), tuple(map(str, value.stride())) if value.layout is torch.strided else value.layout
        return (
            type(value).__name__ if type(value) is torch.nn.Parameter else "Tensor",
            *layout,
            value.dtype,
            value.device,
            value.requires_grad,
        )
    return type(value).__name__


def _candidate(name: str, nodes: Sequence[Node], attributes: dict[str, Any]) -> _Candidate:
    places: dict[Hashable, tuple[str, int]] = {node: ("node", i) for i, node in enumerate(nodes)}
    operands: list[Node] = []

    def plain(argument: Any) -> Hashable:
        if isinstance(argument, Node):
            if _source(argument) not in places:
                places[_source(argument)] = ("operand", len(operands))
                operands.append(argument)
            return places[_source(argument)]
        if isinstance(argument, (list, tuple)):
            return tuple(plain(item) for item in argument)
        return type(argument).__name__, str(argument)

    code = [(node.target, plain(node.args), plain(tuple(node.kwargs.items()))) for node in nodes]
    values = [attributes[str(node.target)] if node.op == "get_attr" else node.meta["val"] for node in operands]
    return _Candidate(name, tuple(nodes), tuple(operands), (tuple(code), tuple(map(_described, values))))


def _outputs(candidate: _Candidate) -> list[int]:
    """Return the positions of the operators whose values are read outside."""
    own = set(candidate.nodes)
    return [i for i, node in enumerate(candidate.nodes) if not own.issuperset(node.users)]


class _Memory(DataFlow):
    """A graph's data flow that knows which of its inputs share memory where the graph is called."""

    def __init__(self, graph: Graph, inputs: Sequence[frozenset[Node]]) -> None:
        """Read a graph; `inputs` has, for each input, the values outside whose memory it may be. Without a caller there are none."""
        super().__init__(graph)
        self._inputs = dict(zip(graph.find_nodes(op="placeholder"), inputs, strict=False))

    def memory(self, node: Node) -> frozenset[Node]:
        """Return the values, here or outside, whose memory a value may be."""
        return frozenset().union(*(self._inputs.get(root, frozenset({root})) for root in self.roots[node]))


def _views(candidate: _Candidate, flow: _Memory) -> list[Node]:
    """Return those of a block's operands that share memory with an operand before them."""
    taken: set[Node] = set()
    found = []
    for node in candidate.operands:
        if node.op != "get_attr" and isinstance(node.meta["val"], Tensor):
            if flow.memory(node) & taken:
                found.append(node)
            taken |= flow.memory(node)
    return found


def _objection(candidate: _Candidate, outputs: Sequence[int], flow: _Memory, attributes: dict[str, Any]) -> str | None:
    """Say why a block cannot be a graph of its own for a compiler, or None."""
    own, mask = set(candidate.nodes), flow.mask(candidate.nodes)
    if flow.before(mask) & flow.after(mask) != mask:
        return "other operators run between its own"
    for root, writers in flow.writers.items():
        if root not in own and any(writer in own for writer in writers):
            return f"it writes to `{root.name}`, which is not its own"
        if root in own and any(writer not in own for writer in writers):
            return f"others write to `{root.name}`, which is its own"
    for node in _views(candidate, flow):
        if any(flow.index[writer] > flow.index[node] for root in flow.roots[node] for writer in flow.writers.get(root, ())):
            return f"`{node.name}` shares memory with another operand, and is written to"
    storages = [flow.roots[candidate.nodes[i]] for i in outputs]
    if any(not own.issuperset(roots) or any(roots & other for other in storages[:i]) for i, roots in enumerate(storages)):
        return "it returns a view of an operand, or two views of one tensor"
    weights = [attributes[str(node.target)] for node in candidate.operands if node.op == "get_attr"]
    if not all(isinstance(weight, Tensor) for weight in weights):
        return "it runs a graph of its own"
    held = [weight.untyped_storage().data_ptr() for weight in weights if weight.layout is torch.strided]
    if len(set(held)) < len(held):
        return "two of its weights share memory"
    return None


def _shared(alike: Sequence[_Candidate], outputs: Sequence[int]) -> OutlinedBlock:
    """Return the graph that stands for blocks that are alike; their weights are inputs."""
    first, graph = alike[0], Graph()
    copies: dict[Hashable, Node] = {}
    for node in first.operands:
        copies[_source(node)] = graph.placeholder(node.name)
        copies[_source(node)].meta = dict(node.meta)
    for node in first.nodes:
        copies[node] = graph.node_copy(node, lambda other: copies[_source(other)])
    graph.output(tuple(copies[first.nodes[i]] for i in outputs))
    return OutlinedBlock({}, graph, "Block")


def _gather(candidate: _Candidate) -> None:
    """Move what stands between a block's operators away: behind them where it depends on one, else before them."""
    own, first, last = set(candidate.nodes), candidate.nodes[0], candidate.nodes[-1]
    between, node = [], first
    while node is not last:
        between += [] if node in own else [node]
        node = node.next
    for node in [node for node in between if node.op == "get_attr"]:
        first.prepend(node)
    between = [node for node in between if node.op != "get_attr"]
    if not between:
        return
    flow = DataFlow(first.graph)
    late = set(flow.select(flow.after(flow.mask(candidate.nodes)))).intersection(between)
    for node in between:
        if node not in late:
            first.prepend(node)
    for node in reversed([node for node in between if node in late]):
        last.append(node)


class _Edit:
    """Replaces blocks of one graph by calls.

    Attributes:
        flow: The graph before the first edit.
    """

    def __init__(self, module: GraphModule, flow: _Memory) -> None:
        """Edit nothing yet."""
        self._module, self.flow = module, flow
        self._now: dict[Node, Node] = {}
        self._copies: dict[Node, Node] = {}

    def _operands(self, candidate: _Candidate) -> list[Node]:
        """Return a block's operands as they are now; a region that is compiled once takes no two views of one tensor, but copies."""
        views = _views(candidate, self.flow)
        for node in views:
            if node not in self._copies:
                now = self._now.get(node, node)
                with self._module.graph.inserting_after(now):
                    copy = self._copies[node] = self._module.graph.call_function(aten.clone.default, (now,))
                copy.meta["val"] = aten.clone.default(node.meta["val"])
        return [self._copies[node] if node in views else self._now.get(node, node) for node in candidate.operands]

    def call(self, candidate: _Candidate, inner: OutlinedBlock, name: str, outputs: Sequence[int]) -> None:
        """Replace a block's operators by a call of a graph that returns what they compute at the positions `outputs`."""
        operands = self._operands(candidate)
        _gather(candidate)
        graph, own = self._module.graph, set(candidate.nodes)
        with graph.inserting_after(candidate.nodes[-1]):
            call = call_graph(self._module, name, inner, operands)
        call.meta[BLOCK] = candidate.name
        anchor: Node = call
        for i, place in enumerate(outputs):
            node = candidate.nodes[place]
            with graph.inserting_after(anchor):
                anchor = self._now[node] = result(call, i, node.name)
            node.replace_all_uses_with(anchor, delete_user_cb=lambda user: user not in own)
        for node in reversed(candidate.nodes):
            graph.erase_node(node)


def _calls(module: GraphModule, flow: _Memory) -> Iterator[tuple[GraphModule, _Memory]]:
    """Yield a graph and those that it calls, each with its data flow."""
    yield module, flow
    for node in module.graph.find_nodes(op="call_module"):
        for _, inner in called_graphs(module, node):
            yield from _calls(inner, _Memory(inner.graph, [flow.memory(a) for a in node.args if isinstance(a, Node)]))


def _outline(module: GraphModule, flow: _Memory, blocks: dict[str, frozenset[str]]) -> tuple[int, dict[str, str]]:
    """Outline the blocks of one graph; return how many are calls now, and why others are not."""
    graph = module.graph
    owner = {name: block for block, names in blocks.items() for name in names}
    members: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.meta.get(REGION_MARK) and node.name in owner:  # names repeat from graph to graph
            members.setdefault(owner[node.name], []).append(node)
    if len(members) < 2:
        return 0, {}
    attributes = {str(n.target): operator.attrgetter(str(n.target))(module) for n in graph.find_nodes(op="get_attr")}
    classes: dict[Hashable, list[_Candidate]] = {}
    for name, nodes in members.items():
        candidate = _candidate(name, nodes, attributes)
        classes.setdefault(candidate.key, []).append(candidate)
    edit, refused, count = _Edit(module, flow), dict[str, str](), 0
    for position, alike in enumerate(classes.values()):
        outputs = sorted({i for candidate in alike for i in _outputs(candidate)})
        objections = {candidate.name: _objection(candidate, outputs, edit.flow, attributes) for candidate in alike}
        refused |= {name: reason for name, reason in objections.items() if reason is not None}
        fit = [candidate for candidate in alike if objections[candidate.name] is None]
        if len(fit) < 2:
            refused |= {candidate.name: "no other block is like it" for candidate in fit}
            continue
        inner = _shared(fit, outputs)
        for candidate in fit:
            edit.call(candidate, inner, f"block{position}", outputs)
        count += len(fit)
    if count:
        for node in [node for node in graph.find_nodes(op="get_attr") if not node.users]:
            graph.erase_node(node)
        module.recompile()
    return count, refused


def outline_blocks(program: ModelProgram) -> PassResult:
    """Make the blocks of the compute graph that are alike calls of one graph, which takes their weights as operands.

    Two blocks are alike if they run the same operators with the same constants, on operands of the same shapes, strides and dtypes.
    Blocks of several kinds share a graph each. A block that is like no other, or that writes to or returns what is not its own, stays as
    it is; the log says which and why. What is around the blocks stays too: the rows that an indicator measures are taken outside of the
    call. The numbers do not change: the same operators run, in an order that respects every write.

    For compilers only: `torch.compile` generates the code of each such graph once, and AOTInductor compiles one package of each. The
    graph of a reused step, and one with the guard inside, stay as they are. The result's `left` has the blocks that are no calls.
    """
    blocks = {block.name: frozenset(block.nodes) for block in program.planned().blocks}
    count, refused = 0, dict[str, str]()
    for module, flow in list(_calls(program.compute, _Memory(program.compute.graph, ()))):
        found, reasons = _outline(module, flow, blocks)
        count, refused = count + found, refused | reasons
    program.compute.recompile()
    for name, reason in refused.items():
        LOGGER.info("%s of %s is compiled for itself: %s", name, program.model_name, reason)
    LOGGER.info("%d of %d blocks of %s are compiled as calls of the graphs that they share", count, len(blocks), program.model_name)
    return PassResult(program, count > 0, refused)
