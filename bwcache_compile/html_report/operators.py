"""Sort the operators of a captured graph by where they stand: before the cached region, in a block, in between, or after it."""

from __future__ import annotations

from torch.fx import Graph

from bwcache_compile.ir.dataflow import DataFlow
from bwcache_compile.ir.graph_text import format_node
from bwcache_compile.ir.plan import BlockSearch, CachePlan


def graph_parts(graph: Graph, search: BlockSearch, plan: CachePlan) -> dict[str, list[str] | list[list[str]]]:
    """Return the operators of each part, printed, in execution order.

    Every operator stands in exactly one part: the first block that has it, else by its dependence on the cached region.

    Args:
        graph: The graph that blocks were searched in.
        search: The blocks that were found in it.
        plan: What of them is cached.

    Returns:
        "prologue", "epilogue" and "between": lines. "between" are those of the cached region that belong to no block. "blocks": for
        each block of the search, its lines.
    """
    owner = {name: place for place, block in reversed(list(enumerate(search.blocks))) for name in block.nodes}
    region = {name for part in plan.regions for name in part.nodes}
    flow = DataFlow(graph)
    after = set(flow.select(flow.after(flow.mask([node for node in flow.nodes if node.name in region]))))
    blocks: list[list[str]] = [[] for _ in search.blocks]
    prologue: list[str] = []
    between: list[str] = []
    epilogue: list[str] = []
    for node in flow.nodes:
        if node.op not in ("call_function", "call_module"):
            continue
        if node.name in owner:
            part = blocks[owner[node.name]]
        elif node.name in region:
            part = between
        else:
            part = epilogue if node in after else prologue
        part.append(format_node(node))
    return {"prologue": prologue, "blocks": blocks, "between": between, "epilogue": epilogue}
