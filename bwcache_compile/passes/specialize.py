"""Derive the graph of a reused step: what is left of the model when no cached block runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from bwcache_compile import policy
from bwcache_compile.dataflow import DataFlow, eliminate_dead_code
from bwcache_compile.layout import Order, in_order
from bwcache_compile.passes._edit import call_traced, inserted, new_input, slot_value
from bwcache_compile.passes.insert_cache import as_time, clock, source_of
from bwcache_compile.program import CachedProgram, CachePlan, PassResult, Region


def _added(order: Order) -> Callable[..., Tensor]:
    def added(source: Tensor, kept: Tensor) -> Tensor:
        return in_order(policy.add_residual(source, kept), order)

    return added


def _extrapolated(order: Order) -> Callable[..., Tensor]:
    def extrapolated(last: Tensor, previous: Tensor, times: Tensor, now: Tensor) -> Tensor:
        return in_order(policy.extrapolate(last, previous, times, as_time(now)), order)

    return extrapolated


def stand_in(
    plan: CachePlan, region: Region, index: int, slots: dict[str, Node], source: Node | None, time: Node
) -> tuple[Callable[..., Tensor] | None, list[Node]]:
    """Choose what a reused step takes in place of the region's output `index`; it lies in memory as that output does.

    Returns:
        A function of tensors and its operands, or None and the slot that stands in as it is.
    """
    kept = slots[region.slot("output", index)]
    order = next(slot.order for slot in region.slots if slot.name == region.slot("output", index))
    if plan.config.reuse == "output":
        return None, [kept]
    if plan.config.reuse == "residual":
        assert source is not None, "the plan proves what each output continues"
        return _added(order), [source, kept]
    return _extrapolated(order), [kept, slots[region.slot("previous", index)], slots[region.slot("times")], time]


def _protect(graph: Graph, slots: dict[str, Node]) -> None:
    """Copy a slot that the epilogue writes to, or that the caller would get hold of."""
    flow = DataFlow(graph)
    returned = frozenset().union(*(flow.roots[node] for node in graph.output_node().all_input_nodes))
    last = graph.find_nodes(op="placeholder")[-1]
    for node in slots.values():
        if node in returned or node in flow.writers:
            with graph.inserting_after(last):
                copy = graph.call_function(torch.ops.aten.clone.default, (node,))
            copy.meta["val"] = node.meta["val"]
            for user in [user for user in node.users if user is not copy]:
                user.replace_input_with(node, copy)


def specialize(program: CachedProgram) -> PassResult:
    """Add the `reuse` graph: prologue as far as still needed, then epilogue; no cached block and no policy.

    Its inputs are the user's, then the slots it reads (`cache_in_*`), then `step`; its outputs are the user's. It
    writes to no slot. The compute graph stays as it is.
    """
    if program.reuse is not None:
        return PassResult(program, False)
    plan, source = program.planned(), program.compute
    user_inputs, user_outputs = len(program.signature.inputs), program.signature.out_spec.num_leaves
    inputs = source.graph.find_nodes(op="placeholder")
    graph = Graph()
    copies: dict[Node, Node] = {node: graph.node_copy(node) for node in inputs[:user_inputs]}
    slots = {}
    for slot in plan.slots:
        if slot.role in ("output", "previous", "times"):
            slots[slot.name] = new_input(graph, f"cache_in_{slot.name}", slot_value(program, slot))
    step = inserted(source.graph, "step")
    copies[step] = graph.node_copy(step)
    unused = {node: new_input(graph, "unused", node.meta["val"]) for node in inputs if node not in copies}
    returned: Any = graph.graph_copy(source.graph, copies | unused)
    graph.output(tuple(returned[:user_outputs]))
    module = GraphModule(source, graph, "Reuse")
    (region,) = plan.regions
    time = copies[clock(program)]
    for i in range(len(region.outputs)):
        node = inserted(graph, f"region_{i}")
        continued = source_of(inserted(graph, "region"), region, i) if region.sources else None
        function, operands = stand_in(plan, region, i, slots, continued, time)
        with graph.inserting_before(node):
            node.replace_all_uses_with(operands[0] if function is None else call_traced(module, f"reuse_{i}", function, operands))
    _protect(graph, slots)
    eliminate_dead_code(graph)
    for node in unused.values():
        graph.erase_node(node)
    return PassResult(program.replace(reuse=GraphModule(module, graph, "Reuse"), reuse_slots=tuple(slots)), True)
