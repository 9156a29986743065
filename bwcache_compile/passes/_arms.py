"""The two arms of a cond: which operators move in, and the graphs that they become."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from bwcache_compile.ir.dataflow import DataFlow
from bwcache_compile.ir.edit import as_graph
from bwcache_compile.ir.torch_compat import FakeTensorMode

aten = torch.ops.aten


def skippable(graph: Graph, region: list[Node], results: Collection[Node], needed: Collection[Node], conds: Collection[Node]) -> list[Node]:
    """Return what only a computed step needs, in order: the region, what it alone reads, and what is made of it for the cache.

    Args:
        graph: A graph without calls.
        region: Operators of the cached blocks.
        results: What a computed step leaves behind for the next one.
        needed: What must run at every step.
        conds: Regions that are guarded already; what depends on them stays between the guards.
    """
    flow = DataFlow(graph)
    fixed, last = set(region), flow.index[region[-1]]
    inner = flow.mask(region)
    candidates = flow.before(inner | flow.mask(results)) & (flow.after(inner) | ~flow.after(flow.mask(conds)))
    chosen = {n for n in flow.select(candidates) if n.op == "call_function" and n not in needed} | fixed
    readers = flow.readers()

    def may_move(node: Node) -> bool:
        if any(reader not in chosen for reader in readers[node]):
            return False
        for root in flow.touched(node):
            writers = flow.writers.get(root, [])
            if node in writers and root not in chosen:
                return False  # an arm writes to nothing that lives outside it
            if any(w not in chosen and flow.index[node] < flow.index[w] <= last for w in writers):
                return False  # the value would be read after it is overwritten
        return True

    while dropped := [node for node in reversed(flow.nodes) if node in chosen and node not in fixed and not may_move(node)]:
        chosen.difference_update(dropped)
    return [node for node in flow.nodes if node in chosen]


class Arm:
    """One arm under construction: it reads outside values and weights through inputs alone.

    Attributes:
        operands: The outside values that it reads, each with its input here.
        copied: The outside operators that run here instead.
    """

    def __init__(self, attributes: dict[str, Any], mode: FakeTensorMode) -> None:
        """Start empty; `attributes` holds what the outside graph's `get_attr` nodes read, `mode` its dynamic sizes."""
        self.graph = Graph()
        self.operands: dict[Node, Node] = {}
        self.copied: list[Node] = []
        self._env: dict[Node, Node] = {}
        self._attributes, self._mode = attributes, mode

    def find(self, node: Node) -> Node:
        """Return what stands for an outside node here: its copy, or an input."""
        if node in self._env:
            return self._env[node]
        if node.op == "get_attr" and isinstance(self._attributes[str(node.target)], GraphModule):
            self._env[node] = self.graph.node_copy(node)  # a higher-order operator takes its graph from where it stands
        else:
            self._env[node] = self.operands[node] = self.graph.placeholder(node.name)
            self._env[node].meta = {"val": node.meta["val"]}
        return self._env[node]

    def copy(self, nodes: Sequence[Node]) -> None:
        """Append copies of outside operators."""
        for node in nodes:
            operands = {a: self.find(a) for a in node.all_input_nodes}
            self._env[node] = self.graph.node_copy(node, operands.__getitem__)
            self.copied.append(node)

    def append(self, target: Callable[..., Any], *args: Any, value: Tensor | None = None, **kwargs: Any) -> Node:
        """Append an operator over nodes of this arm; `value` describes its result where it does not follow from one operand."""
        node = self.graph.call_function(target, args, kwargs)
        args, kwargs = map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = target(*args, **kwargs) if value is None else value
        return node

    def call(self, function: Callable[..., Any], operands: Sequence[Node]) -> Node:
        """Append what a pure tensor function with one result does."""
        inner = as_graph(function, [node.meta["val"] for node in operands], self._mode)
        env = dict(zip(inner.graph.find_nodes(op="placeholder"), operands, strict=True))
        returned = self.graph.graph_copy(inner.graph, env)
        assert isinstance(returned, Node)
        return returned

    def finished(self, operands: Sequence[Node], results: Sequence[Node]) -> GraphModule:
        """Return the arm as a graph over these operands; no result shares storage with another or with an operand."""
        self.graph.output(tuple(results))
        flow = DataFlow(self.graph)
        apart = []
        for i, result in enumerate(results):
            roots = flow.roots[result]
            shared = any(root.op != "call_function" for root in roots) or any(roots & flow.roots[other] for other in results[:i])
            with self.graph.inserting_before(self.graph.output_node()):
                apart.append(self.append(aten.clone.default, result) if shared else result)
        self.graph.output_node().args = (tuple(apart),)
        ordered = Graph()
        env: dict[Node, Node] = {}
        for outside in operands:
            here = self.operands.get(outside)
            copy = ordered.placeholder(outside.name)
            copy.meta = {"val": outside.meta["val"]}
            if here is not None:
                env[here] = copy
        ordered.output(ordered.graph_copy(self.graph, env))
        graphs = {str(n.target): self._attributes[str(n.target)] for n in ordered.find_nodes(op="get_attr")}
        return GraphModule(graphs, ordered)
