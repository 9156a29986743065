"""Move the cached blocks, and whatever runs between them, into a graph of their own."""

from __future__ import annotations

from torch.fx import Graph, GraphModule, Node

from bwcache_compile.ir.dataflow import DataFlow
from bwcache_compile.ir.edit import call_graph, result
from bwcache_compile.ir.plan import Region
from bwcache_compile.ir.program import OURS, REGION_MARK, ModelProgram, PassResult

REGION = f"{OURS}region"
"""Path of a region's graph in the compute graph's module, up to the region's tag."""


def _outline(module: GraphModule, region: list[Node], inputs: list[Node], outputs: list[Node]) -> GraphModule:
    """Copy the region under the same node names; parameters are shared, not copied."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    inside = set(region)
    for node in module.graph.nodes:
        if (node.op == "get_attr" and any(user in inside for user in node.users)) or node in inside:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node in inside:
                copies[node].meta[REGION_MARK] = True
    graph.output(tuple(copies[node] for node in outputs))
    return GraphModule(module, graph, "Region")


def _split(program: ModelProgram, plan: Region, renamed: dict[str, str]) -> None:
    """Move one region out; `renamed` learns the names under which its outputs are read from now on."""
    module, graph = program.compute, program.compute.graph
    named = {node.name: node for node in graph.nodes}
    region = [named[name] for name in plan.nodes]
    inputs, outputs = [named[renamed.get(n, n)] for n in plan.inputs], [named[n] for n in plan.outputs]
    inner = _outline(module, region, inputs, outputs)
    # what does not depend on the region runs before the call, what does runs after it, each in the order it had
    flow = DataFlow(graph)
    inside, mask = set(region), flow.mask(region)
    late = [node for node in flow.select(flow.after(mask) & ~mask) if node.op != "output"]
    first, last = region[0], region[-1]
    moved = inside.union(late)
    for node in flow.nodes[flow.index[first] :]:
        if node not in moved and node.op != "output":
            first.prepend(node)
    with graph.inserting_after(last):
        call = call_graph(module, f"region{plan.tag}", inner, inputs)
    anchor: Node = call
    for i, node in enumerate(outputs):
        with graph.inserting_after(anchor):
            anchor = result(call, i, f"region{plan.tag}_{i}")
        node.replace_all_uses_with(anchor, delete_user_cb=lambda user: user not in inside)
        renamed[node.name] = anchor.name
    for node in late:
        anchor.append(node)
        anchor = node
    for node in reversed(region):
        graph.erase_node(node)
    for node in [n for n in graph.nodes if n.op == "get_attr" and not n.users]:
        graph.erase_node(node)


def split_region(program: ModelProgram) -> PassResult:
    """Leave one call, `region`, where the cached blocks were: prologue, call, epilogue. With guards per block: `region0` ...

    The region reads the prologue's values in plan order and returns the values that the epilogue reads, in plan
    order, as `region_0`, `region_1` ... Node names inside it are the ones they had. The numbers do not change: the
    same operators run, and none moves across a write that it depends on.
    """
    if any(node.op == "call_module" and str(node.target).startswith(REGION) for node in program.compute.graph.nodes):
        return PassResult(program, False)
    renamed: dict[str, str] = {}
    for region in program.planned().regions:
        _split(program, region, renamed)
    program.compute.delete_all_unused_submodules()
    return PassResult(program, True)
