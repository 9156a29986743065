"""Put together what residuals are taken from, where it is no input of the region as it stands."""

from __future__ import annotations

from torch.fx import Node
from torch.fx.node import map_arg

from bwcache_compile.ir.edit import give_role
from bwcache_compile.ir.plan import Region
from bwcache_compile.ir.program import ModelProgram, PassResult
from bwcache_compile.passes.block_search.streams import layout_operator


def source_role(region: Region, name: str) -> str:
    """Return the role of the node that stands for a re-arrangement of the region's inputs."""
    return f"source{region.tag} {name}"


def _arrange(program: ModelProgram, region: Region) -> None:
    graph = program.compute.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    named = {node.name: node for node in order}
    first = named[region.nodes[0]]
    copies: dict[str, Node] = {}
    for name, stand_ins in region.arrangements.items():
        node = named[name]
        operands = {a: copies.get(stand_ins[a.name]) or named[stand_ins[a.name]] for a in node.all_input_nodes}
        last = max([*operands.values(), *copies.values()], key=lambda a: order.get(a, order[first] - 1))
        with graph.inserting_before(first) if order.get(last, -1) < order[first] else graph.inserting_after(last):
            copy = graph.node_copy(node, operands.__getitem__)
        copy.target = layout_operator(node)  # what stands for an operand has its values, and may have other strides
        args, kwargs = map_arg((node.args, node.kwargs), lambda a: operands[a].meta["val"])  # noqa: B023
        copy.meta = {"val": layout_operator(node)(*args, **kwargs)}
        give_role(copy, source_role(region, name))
        order[copy] = max(order.get(last, -1), order[first] - 1)
        copies[name] = copy


def arrange_sources(program: ModelProgram) -> PassResult:
    """Insert, before each region, the re-arrangements of its inputs that its outputs continue: joined streams, or rows of one.

    They are copies of operators of the region over its inputs, as the plan proved. Nothing reads them yet.
    """
    regions = [region for region in program.planned().regions if region.arrangements]
    for region in regions:
        _arrange(program, region)
    return PassResult(program, bool(regions))
