"""Measure how far the blocks' features have moved since the last computed step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from bwcache_compile import policy
from bwcache_compile.graph_text import called_graph
from bwcache_compile.passes._edit import call_traced, inserted, read_slot, result, write_slot
from bwcache_compile.program import OURS, CachedProgram, Measured, PassResult, Region

aten = torch.ops.aten


def _append(after: Node, target: torch._ops.OpOverload, args: tuple[Any, ...], name: str) -> Node:
    graph = after.graph
    with graph.inserting_after(after):
        node = graph.create_node("call_function", target, (after, *args), name=name)
    node.meta["val"] = target(after.meta["val"], *(a.meta["val"] if isinstance(a, Node) else a for a in args))
    return node


def _sample(inner: GraphModule, node: Node, measured: Measured, index: int) -> Node:
    """Take the measured rows of a feature, right where it is computed."""
    if measured.token_range is not None:
        node = _append(node, aten.slice.Tensor, (1, *measured.token_range), f"stream_{index}")
    value: Tensor = node.meta["val"]
    if measured.stride is None:
        return _append(node, aten.clone.default, (), f"sample_{index}")
    rows = torch.Size(value.shape[:-1]).numel()
    places = policy.sampled_tokens(rows, measured.stride, index)
    inner.register_buffer(f"{OURS}tokens_{index}", places.to(value.device), persistent=False)
    node = _append(node, aten.reshape.default, ([rows, value.shape[-1]],), f"rows_{index}")
    with inner.graph.inserting_before(node):
        chosen = inner.graph.get_attr(f"{OURS}tokens_{index}")
    chosen.meta["val"] = value.new_empty(len(places), dtype=torch.int64)  # of the graph's own fake mode
    return _append(node, aten.index_select.default, (0, chosen), f"sample_{index}")


def _measure(program: CachedProgram, region: Region) -> None:
    plan, module, graph = program.planned(), program.compute, program.compute.graph
    call = inserted(graph, f"region{region.tag}")
    inner = called_graph(module, call)
    named = {node.name: node for node in inner.graph.nodes}
    samples = [_sample(inner, named[m.node], m, plan.measured.index(m)) for m in region.measured]
    output = inner.graph.output_node()
    output.args = ((*output.args[0], *samples),)  # type: ignore[misc]
    inner.recompile()
    call.meta["val"] = (*call.meta["val"], *(s.meta["val"] for s in samples))
    anchor: Node = call
    features = []
    for i in range(len(samples)):
        with graph.inserting_after(anchor):
            anchor = result(call, len(region.outputs) + i, region.slot("feature", i))
        features.append(anchor)
    slots = [slot for i in range(len(samples)) for slot in plan.slots if slot.name == region.slot("reference", i)]
    references = [read_slot(program, slot) for slot in slots]

    def change(*tensors: Tensor) -> Tensor:
        return policy.relative_change(tensors[: len(slots)], tensors[len(slots) :])

    operands = [*features, *references]
    with graph.inserting_before(graph.output_node()):
        call_traced(module, region.slot("indicator"), change, operands, region.slot("change"))
    for slot, feature in zip(slots, features, strict=True):
        write_slot(program, slot, feature)


def insert_indicator(program: CachedProgram) -> PassResult:
    """Make `change` the relative L1 change of each measured block, float32[blocks], against the reference slots.

    The region returns the measured rows behind its outputs; each becomes the next value of its reference slot. A
    static policy measures nothing, and the graph stays as it is. With guards per block each has its own `change0` ...
    """
    measuring = [region for region in program.planned().regions if region.measured]
    for region in measuring:
        _measure(program, region)
    return PassResult(program, bool(measuring))
