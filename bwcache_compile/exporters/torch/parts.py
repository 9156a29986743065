"""Group the operators of a graph whose blocks are calls into what runs as one stage."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor
from torch.fx import GraphModule, Node

from bwcache_compile.ir.dataflow import DataFlow
from bwcache_compile.ir.graph_text import called_graph, format_value

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Part:
    """What a stage runs.

    Attributes:
        nodes: Operators, in order.
        call: The call that stands for the block, of whose graph the operators are; None for a part of the outer graph.
        given: Of each input of the block's graph, the operand of the call; of each result of the call, the operator that computes it.
        returned: What a block returns: first the results of the call that others read.
        results: The positions of these.
    """

    nodes: list[Node] = dataclasses.field(default_factory=list)
    call: Node | None = None
    given: Mapping[Node, Node] = dataclasses.field(default_factory=dict)
    returned: tuple[Node, ...] = ()
    results: tuple[int, ...] = ()


def _block(module: GraphModule, call: Node) -> Part:
    graph = called_graph(module, call).graph
    given: Any = dict(zip(graph.find_nodes(op="placeholder"), call.args, strict=True))
    returned: Any = graph.output_node().args[0]
    given |= {node: returned[node.args[1]] for node in call.users if node.target is operator.getitem}
    return Part([node for node in graph.nodes if node.op == "call_function"], call, given, tuple(returned), tuple(range(len(returned))))


def is_worked_out(node: Node) -> bool:
    """Whether a node is a number that follows from sizes, so that each stage can work it out."""
    number = isinstance(node.meta.get("val"), (bool, int, float, SymBool, SymInt, SymFloat))
    return number and node.target not in (aten.item.default, aten._local_scalar_dense.default, operator.getitem)


def _made_by(node: Node) -> Node:
    """Return the operator of whose results a node takes one, if it does, else the node."""
    source = node.args[0] if node.target is operator.getitem else None
    return _made_by(source) if isinstance(source, Node) else node


def grouped(module: GraphModule, flow: DataFlow) -> list[Part]:
    """Group operators and blocks into what a stage runs. Numbers that can be worked out belong to none.

    What stands between two blocks and needs neither runs before the first: then what stands between blocks is alike more often.
    """
    calls = [node for node in flow.nodes if node.op == "call_module"]
    blocks, parts, passed = flow.mask(calls), [Part()], 0
    place: dict[Node, Part] = {}
    for node in flow.nodes:
        if node.op == "call_module":
            parts += [_block(module, node), Part()]
            passed += 1
        elif node.op == "call_function" and not is_worked_out(node):
            source = _made_by(node)
            if source.op == "call_module":
                continue  # one of what a block returned
            early = passed < len(calls) and not flow.ancestors[node] & blocks
            place[node] = place.get(source) or parts[0 if early else -1]
            place[node].nodes.append(node)
    for kind in dict.fromkeys(call.target for call in calls):
        _absorb(parts, blocks, [i for i, part in enumerate(parts) if part.call is not None and part.call.target == kind], flow)
    return [part for part in parts if part.nodes]


def _follow(block: Part, behind: Part, flow: DataFlow, blocks: int) -> list[Node]:
    """Return the operators of the part behind a block that follow from the block and need nothing else there which needs a block."""
    rest, found = flow.mask(node for node in behind.nodes if flow.ancestors[node] & blocks), dict[Node, None]()
    for node in behind.nodes:
        own = flow.mask([node])
        follows = any(other in block.given or other in found for other in node.all_input_nodes)
        if follows and not flow.ancestors[node] & rest & ~own:
            found[node] = None
            rest &= ~own
    return list(found)


def _described(block: Part, nodes: list[Node]) -> list[Hashable]:
    """Describe operators that follow a block, so that equal ones may be alike."""
    places = {node: i for i, node in enumerate(nodes)}

    def plain(argument: Any) -> Hashable:
        if isinstance(argument, Node):
            if argument in places:
                return "operator", places[argument]
            if argument in block.given:
                return "result", block.returned.index(block.given[argument])
            return "value", format_value(argument.meta["val"]) if "val" in argument.meta else argument.op
        if isinstance(argument, (list, tuple)):
            return tuple(plain(item) for item in argument)
        return type(argument).__name__, str(argument)

    return [(node.target, plain(node.args), plain(tuple(node.kwargs.items()))) for node in nodes]


def _read_outside(following: list[list[Node]]) -> list[int]:
    """Return the positions of the operators that others read, behind any of the blocks."""
    return sorted({j for nodes in following for j, node in enumerate(nodes) if not set(nodes).issuperset(node.users)})


def _results_read(block: Part, nodes: list[Node]) -> set[int]:
    """Return the positions of a block's results that others than these operators read."""
    parts = (node for node in block.given if node.target is operator.getitem and not set(nodes).issuperset(node.users))
    return {node.args[1] for node in parts if isinstance(node.args[1], int)}


def _absorb(parts: list[Part], blocks: int, alike: list[int], flow: DataFlow) -> None:
    """Let blocks of a kind run the operators that follow each of them alike, such as taking the rows that an indicator measures."""
    following = [_follow(parts[i], parts[i + 1], flow, blocks) for i in alike]
    described = [_described(parts[i], nodes) for i, nodes in zip(alike, following, strict=True)]
    count = len(list(itertools.takewhile(lambda codes: len(set(codes)) == 1, zip(*described, strict=False))))
    following = [nodes[:count] for nodes in following]
    while not all(isinstance(nodes[j].meta.get("val"), Tensor) for nodes in following for j in _read_outside(following)):
        following = [nodes[:-1] for nodes in following]  # stages hand on tensors alone
    read = _read_outside(following)
    results = sorted({i for k, nodes in zip(alike, following, strict=True) for i in _results_read(parts[k], nodes)})
    for i, nodes in zip(alike, following, strict=True):
        block, behind = parts[i], parts[i + 1]
        returned = (*(block.returned[j] for j in results), *(nodes[j] for j in read))
        parts[i] = dataclasses.replace(block, nodes=[*block.nodes, *nodes], returned=returned, results=tuple(results))
        needed = set(flow.select(flow.before(flow.mask(nodes))))
        parts[0].nodes.extend(node for node in behind.nodes if node in needed and node not in nodes)  # they need no block
        parts[i + 1] = dataclasses.replace(behind, nodes=[node for node in behind.nodes if node not in needed])


def written_elsewhere(parts: list[Part], flow: DataFlow) -> str | None:
    """Return the name of a value that is written to outside of the part that made it."""
    owner = {node: i for i, part in enumerate(parts) for node in part.nodes}
    for root, writers in flow.writers.items():
        for writer in writers:
            if writer.target is not aten.detach_.default and owner.get(writer) != owner.get(root):
                return root.name
    return None
