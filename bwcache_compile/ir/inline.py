"""Inline the graphs that a graph calls."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg


@dataclasses.dataclass(frozen=True)
class Flat:
    """A graph whose calls are written out.

    Attributes:
        graph: The operators, in the order in which they ran, and the calls that stay.
        attributes: What its `get_attr` nodes read and its calls run, by name; weights are shared.
        places: For each node of the original graph, the node that computes its value now; a list for a call.
        parts: The operators that each call became, by its target.
    """

    graph: Graph
    attributes: dict[str, Any]
    places: dict[Node, Any]
    parts: dict[str, list[Node]]


def inline_calls(module: GraphModule, stays: Callable[[GraphModule], bool] = lambda _: False) -> Flat:
    """Copy a graph, with every graph that it calls written out at the call; calls of those for which `stays` is true stay calls."""
    graph = Graph()
    attributes: dict[str, Any] = {}
    reads: dict[str, Node] = {}

    def named(target: str, value: Any) -> str:
        name = target
        while name in attributes and attributes[name] is not value:
            name += "_"  # two graphs have something of that name
        attributes[name] = value
        return name

    def read(owner: GraphModule, node: Node) -> Node:
        name = named(str(node.target), operator.attrgetter(str(node.target))(owner))
        if name not in reads:
            reads[name] = graph.get_attr(name)
            reads[name].meta = dict(node.meta)
        return reads[name]

    def run(owner: GraphModule, values: dict[Node, Any]) -> Any:
        for node in owner.graph.nodes:
            if node.op == "output":
                return map_arg(node.args[0], values.__getitem__)
            if node in values:
                continue
            if node.op == "get_attr":
                values[node] = read(owner, node)
            elif node.op == "call_module":
                inner = owner.get_submodule(str(node.target))
                assert isinstance(inner, GraphModule)
                if stays(inner):
                    values[node] = graph.node_copy(node, values.__getitem__)
                    values[node].target = named(str(node.target), inner)
                    continue
                given = [values[a] for a in node.args if isinstance(a, Node)]
                before = set(graph.nodes)
                values[node] = run(inner, dict(zip(inner.graph.find_nodes(op="placeholder"), given, strict=True)))
                parts[str(node.target)] = [n for n in graph.nodes if n not in before and n.op == "call_function"]
            elif node.target is operator.getitem and isinstance(values[node.args[0]], (list, tuple)):
                values[node] = values[node.args[0]][node.args[1]]
            else:
                values[node] = graph.node_copy(node, values.__getitem__)
        raise AssertionError("a graph has an output")

    parts: dict[str, list[Node]] = {}
    places: dict[Node, Any] = {node: graph.node_copy(node) for node in module.graph.find_nodes(op="placeholder")}
    graph.output(run(module, places))
    return Flat(graph, attributes, places, parts)
