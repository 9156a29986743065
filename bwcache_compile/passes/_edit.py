"""What several transforms need to edit a graph: inputs, slots, and functions as graphs of their own."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from bwcache_compile.program import OURS, CachedProgram, CachePlan, CacheSlot

CACHE = f"{OURS}cache"
"""Path of the buffers that stand for the slots until `lift_cache_state`."""

_ROLE = "bwcache_role"


def fake(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make a tensor without data, to describe a value or to trace with."""
    with FakeTensorMode():
        return torch.empty(tuple(shape), dtype=dtype, device=device)


def inserted(graph: Graph, role: str) -> Node:
    """Return the node that a pass inserted for a role (`step`, `region_0`, `change` ...).

    Its name may be another one: the model's own inputs and operators keep theirs.
    """
    return next(node for node in graph.nodes if node.meta.get(_ROLE) == role)


def new_input(graph: Graph, name: str, value: Any) -> Node:
    """Add an input at the insertion point, under another name if the model has one of that name."""
    node = graph.placeholder(name)
    node.target = node.name
    node.meta["val"] = value
    return node


def graph_input(graph: Graph, role: str, value: Tensor) -> Node:
    """Return our input of that role, after adding it behind the others if it is not there; `step` stays the last."""
    inputs = graph.find_nodes(op="placeholder")
    for node in inputs:
        if node.meta.get(_ROLE) == role:
            return node
    last = inputs[-1]
    with graph.inserting_before(last) if last.meta.get(_ROLE) == "step" else graph.inserting_after(last):
        node = new_input(graph, role, value)
    node.meta[_ROLE] = role
    return node


def step_input(program: CachedProgram) -> Node:
    """Return the input that holds the step, int64[1]."""
    return graph_input(program.compute.graph, "step", fake((1,), torch.int64, program.planned().device))


def read_slot(program: CachedProgram, slot: CacheSlot) -> Node:
    """Return a node that reads a slot, standing before all operators."""
    graph, module = program.compute.graph, program.compute
    if not hasattr(module, CACHE):
        module.add_module(CACHE, nn.Module())
    holder = module.get_submodule(CACHE)
    if slot.name not in dict(holder.named_buffers()):
        holder.register_buffer(slot.name, torch.empty(slot.shape, dtype=slot.dtype, device="meta"), persistent=False)
    path = f"{CACHE}.{slot.name}"
    for node in graph.find_nodes(op="get_attr"):
        if node.target == path:
            return node
    inputs = graph.find_nodes(op="placeholder")
    with graph.inserting_after(inputs[-1]):
        node = graph.get_attr(path)
    node.meta["val"] = fake(slot.shape, slot.dtype, program.planned().device)
    return node


def write_slot(program: CachedProgram, slot: CacheSlot, value: Node) -> None:
    """Make a slot's next value known, at the end of the graph."""
    target = read_slot(program, slot)
    graph = program.compute.graph
    with graph.inserting_before(graph.output_node()):
        node = graph.call_function(torch.ops.aten.copy_.default, (target, value))
    node.meta["val"] = target.meta["val"]


def slots_by_role(plan: CachePlan, role: str) -> list[CacheSlot]:
    """Return the plan's slots of one role, in plan order."""
    return [slot for slot in plan.slots if slot.role == role]


def as_graph(function: Callable[..., Any], examples: Sequence[Tensor]) -> GraphModule:
    """Trace a pure tensor function into a graph, with the shapes, dtypes and device of the examples."""
    with FakeTensorMode():
        inputs = [torch.empty(e.shape, dtype=e.dtype, device=e.device) for e in examples]
        traced = make_fx(function, tracing_mode="real")(*inputs)
    for node in traced.graph.nodes:
        node.meta.pop("tensor_meta", None)
        node.meta.pop("stack_trace", None)
    return traced


def call_graph(module: GraphModule, name: str, inner: GraphModule, operands: Sequence[Node], role: str | None = None) -> Node:
    """Insert a call of a graph; its results are read with `result`. The caller chooses the insertion point."""
    module.add_submodule(OURS + name, inner)
    node = module.graph.create_node("call_module", OURS + name, tuple(operands), name=role or name)
    node.meta[_ROLE] = role or name
    returned = inner.graph.output_node().args[0]
    if isinstance(returned, (list, tuple)):
        node.meta["val"] = tuple(item.meta.get("val") for item in returned)  # type: ignore[union-attr]
    else:
        node.meta["val"] = returned.meta.get("val")  # type: ignore[union-attr]
    return node


def call_traced(module: GraphModule, name: str, function: Callable[..., Any], operands: Sequence[Node], role: str | None = None) -> Node:
    """Insert a call of a pure tensor function, traced for these operands."""
    return call_graph(module, name, as_graph(function, [node.meta["val"] for node in operands]), operands, role)


def result(call: Node, index: int, name: str) -> Node:
    """Read one result of a call, under a name of its own."""
    graph = call.graph
    node = graph.create_node("call_function", operator.getitem, (call, index), name=name)
    node.meta |= {"val": call.meta["val"][index], _ROLE: name}
    return node
