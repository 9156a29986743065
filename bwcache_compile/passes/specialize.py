"""Derive the graph of a reused step: what is left of the model when no cached block runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from bwcache_compile.ir.dataflow import DataFlow, eliminate_dead_code
from bwcache_compile.ir.edit import as_graph, call_traced, check_results, fake_mode, inserted, new_input, slot_value
from bwcache_compile.ir.own_inputs import parameter_inputs
from bwcache_compile.ir.plan import Region
from bwcache_compile.ir.program import ModelProgram, PassResult
from bwcache_compile.passes.insert_cache import clock, source_of, traceable


def stand_in(
    program: ModelProgram, region: Region, index: int, slots: dict[str, Node], source: Node | None, others: dict[str, Node]
) -> tuple[Callable[..., Any] | None, list[Node]]:
    """Choose what a reused step takes in place of the region's output `index`; it lies in memory as that output does.

    Args:
        program: Past planning.
        region: What is skipped.
        index: Position among its outputs.
        slots: The inputs that hold the state, by slot name.
        source: What the output continues, where the plan proves it.
        others: The inputs that tell the time and hold the step and the parameters, by name.

    Returns:
        A function of tensors and its operands, or None and the slot that stands in as it is.
    """
    plan = program.planned()
    way, described = plan.settings.way, {slot.name: slot for slot in region.slots}
    named = {f"kept_{kind}": region.slot(kind, index) for kind in way.slots}
    named |= {f"kept_{slot.name}": region.slot(slot.name) for slot in way.shared}
    given: dict[str, Node | None] = {"source": source, **others, **{name: slots[slot] for name, slot in named.items()}}
    first = described[region.slot(way.slots[0], index)]
    names, function = traceable(program, way.reuse, [first.order])
    found = [node for node in (given[name] for name in names) if node is not None]
    assert len(found) == len(names), "the plan proves what each output continues"
    traced = as_graph(function, [node.meta["val"] for node in found], fake_mode(program.compute.graph))
    (returned,) = traced.graph.output_node().all_input_nodes
    check_results(f"reuse={plan.settings.reuse!r}: `{way.reuse.__name__}`", [returned], [slot_value(program, first)])
    if returned.op == "placeholder":
        return None, [found[traced.graph.find_nodes(op="placeholder").index(returned)]]
    shares = any(root.op != "call_function" for root in DataFlow(traced.graph).roots[returned])
    return lambda *values: function(*values)[0].clone() if shares else function(*values)[0], found


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


def specialize(program: ModelProgram) -> PassResult:
    """Add the `reuse` graph: prologue as far as still needed, then epilogue; no cached block and no policy.

    Its inputs are the user's, then the slots it reads (`cache_in_*`), what it takes of the settings (`policy_*`), then `step`; its
    outputs are the user's. It writes to no slot. The compute graph stays as it is.
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
        if slot.role in plan.settings.way.slot_names:
            slots[slot.name] = new_input(graph, f"cache_in_{slot.name}", slot_value(program, slot))
    step = inserted(source.graph, "step")
    copies[step] = graph.node_copy(step)
    parameters = parameter_inputs(program, graph, plan.settings.way.parameters)
    unused = {node: new_input(graph, "unused", node.meta["val"]) for node in inputs if node not in copies}
    returned: Any = graph.graph_copy(source.graph, copies | unused)
    graph.output(tuple(returned[:user_outputs]))
    module = GraphModule(source, graph, "Reuse")
    (region,) = plan.regions
    others = {"time": copies[clock(program)], "step": copies[step], **parameters}
    for i in range(len(region.outputs)):
        node = inserted(graph, f"region_{i}")
        continued = source_of(inserted(graph, "region"), region, i) if region.sources else None
        function, operands = stand_in(program, region, i, slots, continued, others)
        with graph.inserting_before(node):
            node.replace_all_uses_with(operands[0] if function is None else call_traced(module, f"reuse_{i}", function, operands))
    _protect(graph, slots)
    eliminate_dead_code(graph)
    for node in unused.values():
        graph.erase_node(node)
    return PassResult(program.replace(reuse=GraphModule(module, graph, "Reuse"), reuse_slots=tuple(slots)), True)
