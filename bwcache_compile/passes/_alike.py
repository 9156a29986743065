"""Which blocks run the same operators, and which of them can be graphs of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from bwcache_compile.ir.dataflow import DataFlow


@dataclasses.dataclass(frozen=True)
class Candidate:
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


def source(node: Node) -> Hashable:
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


def candidate_of(name: str, nodes: Sequence[Node], attributes: dict[str, Any]) -> Candidate:
    places: dict[Hashable, tuple[str, int]] = {node: ("node", i) for i, node in enumerate(nodes)}
    operands: list[Node] = []

    def plain(argument: Any) -> Hashable:
        if isinstance(argument, Node):
            if source(argument) not in places:
                places[source(argument)] = ("operand", len(operands))
                operands.append(argument)
            return places[source(argument)]
        if isinstance(argument, (list, tuple)):
            return tuple(plain(item) for item in argument)
        return type(argument).__name__, str(argument)

    code = [(node.target, plain(node.args), plain(tuple(node.kwargs.items()))) for node in nodes]
    values = [attributes[str(node.target)] if node.op == "get_attr" else node.meta["val"] for node in operands]
    return Candidate(name, tuple(nodes), tuple(operands), (tuple(code), tuple(map(_described, values))))


def read_outside(nodes: Sequence[Node]) -> list[int]:
    """Return the positions of the operators whose values are read outside."""
    own = set(nodes)
    return [i for i, node in enumerate(nodes) if not own.issuperset(node.users)]


def shares_outputs(nodes: Sequence[Node], outputs: Sequence[int], flow: DataFlow) -> bool:
    """Whether a block that returns what it computes at the positions `outputs` returns a view of an operand, or two of one tensor."""
    own, storages = set(nodes), [flow.roots[nodes[i]] for i in outputs]
    return any(not own.issuperset(roots) or any(roots & other for other in storages[:i]) for i, roots in enumerate(storages))


def without_last_views(nodes: Sequence[Node], flow: DataFlow) -> list[Node]:
    """Leave out the views that a block makes for others alone: they are made outside of it, of what it computes."""
    own, writers = set(nodes), {writer for found in flow.writers.values() for writer in found}
    for node in reversed(nodes):
        if own.isdisjoint(node.users) and flow.roots[node] != {node} and node not in writers:
            own.remove(node)
    return [node for node in nodes if node in own]


class Memory(DataFlow):
    """A graph's data flow that knows which of its inputs share memory where the graph is called."""

    def __init__(self, graph: Graph, inputs: Sequence[frozenset[Node]]) -> None:
        """Read a graph; `inputs` has, for each input, the values outside whose memory it may be. Without a caller there are none."""
        super().__init__(graph)
        self._inputs = dict(zip(graph.find_nodes(op="placeholder"), inputs, strict=False))

    def memory(self, node: Node) -> frozenset[Node]:
        """Return the values, here or outside, whose memory a value may be."""
        return frozenset().union(*(self._inputs.get(root, frozenset({root})) for root in self.roots[node]))


def repeated_views(candidate: Candidate, flow: Memory) -> list[Node]:
    """Return those of a block's operands that share memory with an operand before them."""
    taken: set[Node] = set()
    found = []
    for node in candidate.operands:
        if node.op != "get_attr" and isinstance(node.meta["val"], Tensor):
            if flow.memory(node) & taken:
                found.append(node)
            taken |= flow.memory(node)
    return found


def entangled(candidate: Candidate, flow: Memory, attributes: dict[str, Any]) -> str | None:
    """Say why a block cannot be a graph of its own, or None."""
    mask = flow.mask(candidate.nodes)
    if flow.before(mask) & flow.after(mask) != mask:
        return "other operators run between its own"
    if not all(isinstance(attributes[str(node.target)], Tensor) for node in candidate.operands if node.op == "get_attr"):
        return "it runs a graph of its own"
    return None


def shares_memory(candidate: Candidate, outputs: Sequence[int], flow: Memory, attributes: dict[str, Any]) -> str | None:
    """Say why a block cannot be a region of a compiled graph, which shares no memory with what is around it, or None."""
    own = set(candidate.nodes)
    for root, writers in flow.writers.items():
        if root not in own and any(writer in own for writer in writers):
            return f"it writes to `{root.name}`, which is not its own"
        if root in own and any(writer not in own for writer in writers):
            return f"others write to `{root.name}`, which is its own"
    for node in repeated_views(candidate, flow):
        if any(flow.index[writer] > flow.index[node] for root in flow.roots[node] for writer in flow.writers.get(root, ())):
            return f"`{node.name}` shares memory with another operand, and is written to"
    if shares_outputs(candidate.nodes, outputs, flow):
        return "it returns a view of an operand, or two views of one tensor"
    weights = [attributes[str(node.target)] for node in candidate.operands if node.op == "get_attr"]
    held = [weight.untyped_storage().data_ptr() for weight in weights if weight.layout is torch.strided]
    if len(set(held)) < len(held):
        return "two of its weights share memory"
    return None
