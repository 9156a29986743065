"""Keep what a reused step will need, as the way of reusing says."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from bwcache_compile.ir.dataflow import DataFlow
from bwcache_compile.ir.edit import call_pure, check_results, inserted, read_slot, slot_value, write_slot
from bwcache_compile.ir.graph_text import called_graph
from bwcache_compile.ir.layout import Order, in_order, memory_order
from bwcache_compile.ir.own_inputs import step_input
from bwcache_compile.ir.plan import CacheSlot, Region
from bwcache_compile.ir.program import ModelProgram, PassResult
from bwcache_compile.ir.samples import each_sample
from bwcache_compile.ir.torch_compat import statically_known_true
from bwcache_compile.passes.arrange_sources import source_role
from bwcache_compile.policies.definitions import takes

aten = torch.ops.aten


def _as_time(clock: Tensor) -> Tensor:
    """The time of this step, float32[1], from an input of any rank: of a batch, the first."""
    return clock.reshape(-1)[:1].float()


def _times(clock: Tensor, step: Tensor) -> Tensor:
    """The time of each sample, float32[samples], from an input that holds one for each or one for all; `step` is int64[samples]."""
    count = step.shape[0]
    if clock.dim() > 0 and statically_known_true(clock.shape[0] == count):
        return clock.reshape(count, -1)[:, 0].float()
    return _as_time(clock).expand(count)


def clock(program: ModelProgram) -> Node:
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


def _snapshot(program: ModelProgram, value: Node, shared: bool) -> Node:
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
    """Return what the region's output `index` continues: an operand of the region's call, or operands put together."""
    name = region.sources[region.outputs[index]]
    if name in region.arrangements:
        return inserted(call.graph, source_role(region, name))
    source = call.args[region.inputs.index(name)]
    assert isinstance(source, Node)
    return source


def traceable(
    program: ModelProgram, function: Callable[..., Any], orders: Sequence[Order]
) -> tuple[tuple[str, ...], Callable[..., tuple[Tensor, ...]]]:
    """Return a function of a way of reusing as the passes trace it, and the names of its operands.

    It takes the time as it comes and hands it on as float32[1]. Results lie in memory as `orders` say, except those that are
    operands. With `batch_reduce="per_sample"` it takes the step first, and applies the function to each sample.
    """
    names, settings = takes(function), program.planned().settings
    samples = settings.batch_reduce == "per_sample"
    each = each_sample(function, f"reuse={settings.reuse!r}: `{function.__name__}`")

    @functools.wraps(each if samples else function)
    def traced(*operands: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, operands[samples:], strict=True))
        if "time" in given:
            given["time"] = _times(given["time"], operands[0]) if samples else _as_time(given["time"])
        returned = each(operands[0], *given.values()) if samples else function(*given.values())
        results = tuple(returned) if isinstance(returned, (list, tuple)) else (returned,)
        return tuple(r if any(r is v for v in operands) else in_order(r, order) for r, order in zip(results, orders, strict=True))

    return (("step", *names) if samples else names), traced


def _next_values(
    program: ModelProgram, what: str, function: Callable[..., Any], slots: Sequence[CacheSlot], named: dict[str, Callable[[], Node]]
) -> list[Node]:
    """Insert what gives some slots their next values, at the insertion point, and return these.

    Args:
        program: Its compute graph is edited.
        what: Name of the call.
        function: Of a way of reusing: `keep` or `keep_shared`.
        slots: What it updates, in order.
        named: Makes what it may take.
    """
    names, traced = traceable(program, function, [slot.order for slot in slots])
    values = call_pure(program.compute, what, traced, [named[name]() for name in names])
    expected = [slot_value(program, slot) for slot in slots]
    check_results(f"reuse={program.planned().settings.reuse!r}: `{function.__name__}`", values, expected)
    return values


def _itself(node: Node) -> Node:
    return node


def _keep(program: ModelProgram, region: Region) -> None:
    plan, graph = program.planned(), program.compute.graph
    way, slots = plan.settings.way, {slot.name: slot for slot in plan.slots}
    call = inserted(graph, f"region{region.tag}")
    shared_storage = _shared_inside(called_graph(program.compute, call))
    shared = [slots[region.slot(slot.name)] for slot in way.shared]

    def readable(*held: CacheSlot) -> dict[str, Callable[[], Node]]:
        kept = {f"kept_{slot.role}": functools.partial(read_slot, program, slot) for slot in (*held, *shared)}
        return {**kept, "time": lambda: clock(program), "step": lambda: step_input(program)}

    for i in range(len(region.outputs)):
        own = [slots[region.slot(kind, i)] for kind in way.slots]
        value = inserted(graph, f"region{region.tag}_{i}")
        named: dict[str, Callable[[], Node]] = {
            **readable(*own),
            "source": functools.partial(source_of, call, region, i),
            "output": functools.partial(_itself, value),
        }
        with graph.inserting_after(value):
            kept = _next_values(program, region.slot("keep", i), way.keep, own, named)
        # the last one first: a slot hands its value on before it takes another
        for slot, following in reversed(list(zip(own, kept, strict=True))):
            write_slot(program, slot, _snapshot(program, value, shared_storage[i]) if following is value else following)
    if way.keep_shared is not None:
        with graph.inserting_before(graph.output_node()):
            moved = _next_values(program, region.slot("keep_shared"), way.keep_shared, shared, readable())
        for slot, following in zip(shared, moved, strict=True):
            write_slot(program, slot, following)


def insert_cache(program: ModelProgram) -> PassResult:
    """Write each slot of the way of reusing; nothing later in the step can change what was kept.

    A slot keeps the region's output itself, what another slot held, or what is made of them (with `reuse="residual"`,
    output minus input, proved to belong together by the plan).
    """
    for region in program.planned().regions:
        _keep(program, region)
    return PassResult(program, True)
