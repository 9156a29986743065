"""Sort the operators of a captured graph by where they stand: before the cached region, in a block, in between, or after it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch.fx import Graph, Node

from bwcache_compile.ir.dataflow import DataFlow
from bwcache_compile.ir.graph_text import format_node
from bwcache_compile.ir.plan import BlockSearch, CachePlan

Part = int | Literal["prologue", "between", "epilogue"]
"""Where an operator stands: the place of its block in the search, or outside of every block."""


def placed_operators(graph: Graph, search: BlockSearch, plan: CachePlan) -> Iterator[tuple[Node, Part]]:
    """Yield each operator of a captured graph with its part, in execution order.

    Every operator stands in exactly one part: the first block that has it, else by its dependence on the cached region. What belongs
    to the region and to no block is "between".

    Args:
        graph: The graph that blocks were searched in.
        search: The blocks that were found in it.
        plan: What of them is cached.
    """
    owner = {name: place for place, block in reversed(list(enumerate(search.blocks))) for name in block.nodes}
    region = {name for part in plan.regions for name in part.nodes}
    flow = DataFlow(graph)
    after = set(flow.select(flow.after(flow.mask([node for node in flow.nodes if node.name in region]))))
    for node in flow.nodes:
        if node.op not in ("call_function", "call_module"):
            continue
        if node.name in owner:
            yield node, owner[node.name]
        elif node.name in region:
            yield node, "between"
        else:
            yield node, "epilogue" if node in after else "prologue"


def graph_parts(graph: Graph, search: BlockSearch, plan: CachePlan) -> dict[str, list[str] | list[list[str]]]:
    """Return the operators of each part, printed; see `placed_operators`. "blocks" has the lines of each block of the search."""
    blocks: list[list[str]] = [[] for _ in search.blocks]
    others: dict[str, list[str]] = {"prologue": [], "between": [], "epilogue": []}
    for node, part in placed_operators(graph, search, plan):
        (blocks[part] if isinstance(part, int) else others[part]).append(format_node(node))
    return {"blocks": blocks, **others}
