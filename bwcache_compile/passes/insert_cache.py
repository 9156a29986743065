"""Keep what a reused step will need: the region's outputs, or what it added to its inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from bwcache_compile import policy
from bwcache_compile.dataflow import DataFlow
from bwcache_compile.graph_text import called_graph
from bwcache_compile.layout import Order, in_order, memory_order
from bwcache_compile.passes._edit import call_traced, inserted, read_slot, step_input, write_slot
from bwcache_compile.program import CachedProgram, PassResult, Region

aten = torch.ops.aten


def as_time(clock: Tensor) -> Tensor:
    """The time of this step, float32[1], from an input of any rank: of a batch, the first."""
    return clock.reshape(-1)[:1].float()


def _push_time(time: Tensor, times: Tensor) -> Tensor:
    return torch.cat([as_time(time), times[:1]])


def clock(program: CachedProgram) -> Node:
    """Return the input that tells the time for extrapolation."""
    name = program.planned().time_input
    if name is None:
        return step_input(program)
    return next(node for node in program.compute.graph.find_nodes(op="placeholder") if node.name == name)


def _shared_inside(inner: GraphModule) -> list[bool]:
    """For each output of the region: whether its storage may be an input's, a parameter's or another output's."""
    flow = DataFlow(inner.graph)
    outputs = inner.graph.output_node().all_input_nodes
    shared = []
    for output in outputs:
        roots = flow.roots[output]
        foreign = any(root.op != "call_function" for root in roots)
        shared.append(foreign or any(roots & flow.roots[other] for other in outputs if other is not output))
    return shared


def _snapshot(program: CachedProgram, value: Node, shared: bool) -> Node:
    """Copy a value if its storage could change afterwards or has gaps.

    The epilogue may write to it in place, the caller may write to an output that is a view of it.
    """
    graph = program.compute.graph
    flow = DataFlow(graph)
    roots = flow.roots[value]
    returned = any(roots & flow.roots[node] for node in graph.output_node().all_input_nodes)
    written = any(root in flow.writers for root in roots)
    gaps = memory_order(value.meta["val"]) is None
    if not (shared or returned or written or gaps):
        return value
    layout = torch.contiguous_format if gaps else torch.preserve_format
    with graph.inserting_after(value):
        copy = graph.call_function(aten.clone.default, (value,), {"memory_format": layout})
    copy.meta["val"] = torch.empty_like(value.meta["val"], memory_format=layout)
    return copy


def source_of(call: Node, region: Region, index: int) -> Node:
    """Return what the region's output `index` continues: an operand of the region's call."""
    source = call.args[region.inputs.index(region.sources[region.outputs[index]])]
    assert isinstance(source, Node)
    return source


def _residual(order: Order) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda output, source: in_order(policy.residual(output, source), order)


def _keep(program: CachedProgram, region: Region) -> None:
    plan, graph = program.planned(), program.compute.graph
    slots = {slot.name: slot for slot in plan.slots}
    call = inserted(graph, f"region{region.tag}")
    shared = _shared_inside(called_graph(program.compute, call))
    for i in range(len(region.outputs)):
        slot = slots[region.slot("output", i)]
        value = inserted(graph, f"region{region.tag}_{i}")
        if plan.config.reuse == "residual":
            with graph.inserting_after(value):
                operands = [value, source_of(call, region, i)]
                kept = call_traced(program.compute, region.slot("keep", i), _residual(slot.order), operands)
        else:
            kept = _snapshot(program, value, shared[i])
        if plan.config.reuse == "taylor":
            write_slot(program, slots[region.slot("previous", i)], read_slot(program, slot))
        write_slot(program, slot, kept)
    if plan.config.reuse == "taylor":
        slot = slots[region.slot("times")]
        time, times = clock(program), read_slot(program, slot)
        with graph.inserting_before(graph.output_node()):
            moved = call_traced(program.compute, region.slot("push_time"), _push_time, [time, times])
        write_slot(program, slot, moved)


def insert_cache(program: CachedProgram) -> PassResult:
    """Write each output slot from the region's outputs; nothing later in the step can change what was kept.

    With `reuse="residual"` the slot keeps output minus input, proved to belong together by the plan. With "taylor"
    the slot's old value moves to `previous_*`, and `times` keeps the two times.
    """
    for region in program.planned().regions:
        _keep(program, region)
    return PassResult(program, True)
