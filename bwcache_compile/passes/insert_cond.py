"""Put the guard into the graph: one graph that computes or reuses by itself, for one-file deployment and fullgraph compilation."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from bwcache_compile.ir.dataflow import eliminate_dead_code
from bwcache_compile.ir.edit import fake, fake_mode, inserted, new_input, slot_value
from bwcache_compile.ir.inline import Flat, inline_calls
from bwcache_compile.ir.layout import memory_order
from bwcache_compile.ir.own_inputs import parameter_inputs
from bwcache_compile.ir.plan import Region
from bwcache_compile.ir.program import OURS, ModelProgram, PassResult
from bwcache_compile.ir.torch_compat import force_stride_order
from bwcache_compile.passes._arms import Arm, skippable
from bwcache_compile.passes.insert_cache import clock, source_of
from bwcache_compile.passes.specialize import stand_in
from bwcache_compile.passes.split_region import REGION

aten = torch.ops.aten
cond = torch.ops.higher_order.cond


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The graph under construction, and where the pieces of one region are in it.

    Attributes:
        slots: The inputs that hold the state, by slot name.
        following: What a computed step leaves behind: the slots' next values, `reuse_left` and `change`.
        outputs: The region's outputs.
        sources: What they continue, with `reuse="residual"`.
        others: The inputs that hold the step, tell the time and hold what a reused step takes of the settings, by name.
    """

    program: ModelProgram
    flat: Flat
    region: Region
    slots: dict[str, Node]
    following: dict[str, Node]
    outputs: list[Node]
    sources: list[Node]
    others: dict[str, Node]


def _append(graph: Graph, target: Callable[..., Any], *args: Any, name: str, value: Any) -> Node:
    node = graph.create_node("call_function", target, args, name=name)
    node.meta["val"] = value
    return node


def _slot_inputs(flat: Flat, program: ModelProgram) -> dict[str, Node]:
    """Give the graph an input for every slot, in the order of `guard_slots`, behind the user's inputs."""
    plan = program.planned()
    inputs = flat.graph.find_nodes(op="placeholder")
    there = {str(node.target): node for node in inputs}
    anchor = inputs[len(program.signature.inputs) - 1]
    slots = {}
    for slot in plan.guard_slots:
        node = there.get(f"cache_in_{slot.name}")
        if node is None:
            with flat.graph.inserting_after(anchor):
                node = new_input(flat.graph, f"cache_in_{slot.name}", slot_value(program, slot))
        else:
            anchor.append(node)
        slots[slot.name] = anchor = node
    return slots


def _with_fixed_strides(graph: Graph, operand: Node) -> Node:
    """Hold an operand to the strides that it was traced with.

    Inductor lowers the arms for those strides, but lays the operands out as it likes: wrong numbers, or with its size
    asserts on, an error. Eagerly the operator returns its operand.
    """
    value = operand.meta["val"]
    if operand.op != "call_function" or not isinstance(value, Tensor):
        return operand
    return _append(graph, force_stride_order(), operand, list(value.stride()), name=f"{operand.name}_laid_out", value=value)


def _arms(parts: _Parts) -> tuple[Arm, Arm, dict[str, tuple[Node, Node]]]:
    """Build both arms of a region's cond, and say what they return, by name: the computing one's node, the reusing one's."""
    plan, region, slots = parts.program.planned(), parts.region, parts.slots
    mode = fake_mode(parts.flat.graph)
    computing, reusing = Arm(parts.flat.attributes, mode), Arm(parts.flat.attributes, mode)
    earlier = [node for node in parts.flat.graph.nodes if node.target is cond]
    needed = {*parts.sources, *parts.flat.graph.output_node().all_input_nodes}
    part = parts.flat.parts[f"{REGION}{region.tag}"]
    computing.copy(skippable(parts.flat.graph, part, list(parts.following.values()), needed, earlier))
    results: dict[str, tuple[Node, Node]] = {}
    as_they_are: set[str] = set()
    for i, node in enumerate(parts.outputs):
        source = parts.sources[i] if parts.sources else None
        function, operands = stand_in(parts.program, region, i, slots, source, parts.others)
        if function is None:
            as_they_are |= {name for name, node in slots.items() if node is operands[0]}
        here = [reusing.find(n) for n in operands]
        held = here[0] if function is None else reusing.call(function, here)
        made = computing.find(node)
        if memory_order(node.meta["val"]) is None:  # an arm returns no tensor with gaps
            made = computing.append(aten.clone.default, made, memory_format=torch.contiguous_format)
        results[f"region{region.tag}_{i}"] = made, held
    for slot in region.slots:
        following = parts.following[slot.name]
        # a held output is what the region returns in both arms, so it is returned once
        if slot.name not in as_they_are or following not in parts.outputs:
            results[slot.name] = computing.find(following), reusing.find(slots[slot.name])
    until, left = region.slot("reuse_until"), computing.find(parts.following[region.slot("reuse_left")])
    until_now = computing.append(aten.add.Tensor, computing.find(parts.others["step"]), left, value=left.meta["val"])
    results[until] = until_now, reusing.find(slots[until])
    if region.measured:
        size, nan = [len(region.measured)], float("nan")
        empty = fake(size, torch.float32, plan.device)
        nothing = reusing.append(aten.full.default, size, nan, dtype=torch.float32, device=plan.device, value=empty)
        results[region.slot("change")] = computing.find(parts.following[region.slot("change")]), nothing
    return computing, reusing, results


def _insert(parts: _Parts) -> dict[str, Node]:
    """Put one region into a cond; return the next value of each of its slots, and `change`, by name."""
    graph, region, device = parts.flat.graph, parts.region, parts.program.planned().device
    computing, reusing, results = _arms(parts)
    outside = list(dict.fromkeys([*computing.operands, *reusing.operands]))
    # right behind the region: before whoever reads its outputs
    with graph.inserting_before(parts.flat.parts[f"{REGION}{region.tag}"][-1].next):
        flag = fake((), torch.bool, device)
        step = _append(graph, aten.reshape.default, parts.others["step"], [], name="now", value=fake((), torch.int64, device))
        until = parts.slots[region.slot("reuse_until")]
        last = _append(graph, aten.reshape.default, until, [], name=f"last{region.tag}", value=step.meta["val"])
        reuses = _append(graph, aten.le.Tensor, step, last, name=f"reuses{region.tag}", value=flag)
        operands = tuple(_with_fixed_strides(graph, node) for node in outside)
        arms = []
        for kind, arm, column in (("reuse", reusing, 1), ("compute", computing, 0)):
            name = f"{OURS}{kind}_arm{region.tag}"
            parts.flat.attributes[name] = arm.finished(outside, [pair[column] for pair in results.values()])
            arms.append(graph.get_attr(name))
        values = tuple(pair[0].meta["val"] for pair in results.values())
        call = _append(graph, cond, reuses, *arms, operands, name=f"guard{region.tag}", value=values)
        found = {name: _append(graph, operator.getitem, call, i, name=name, value=values[i]) for i, name in enumerate(results)}
    inside = set(computing.copied)
    for i, node in enumerate(parts.outputs):
        node.replace_all_uses_with(found[f"region{region.tag}_{i}"], delete_user_cb=lambda user: user not in inside)
        for key, value in parts.flat.places.items():
            if value is node:
                parts.flat.places[key] = found[f"region{region.tag}_{i}"]
        for slot in region.slots:
            if parts.following[slot.name] is node:
                found.setdefault(slot.name, found[f"region{region.tag}_{i}"])
    for node in reversed(computing.copied):
        graph.erase_node(node)
    return found


def _parts(
    program: ModelProgram, flat: Flat, region: Region, slots: dict[str, Node], parameters: dict[str, Node], returned: dict[str, Node]
) -> _Parts:
    compute = program.compute.graph
    call = inserted(compute, f"region{region.tag}")
    names = [*(slot.name for slot in region.slots), region.slot("reuse_left"), region.slot("change")]
    return _Parts(
        program=program,
        flat=flat,
        region=region,
        slots=slots,
        following={name: returned[name] for name in names if name in returned},
        outputs=[flat.places[inserted(compute, f"region{region.tag}_{i}")] for i in range(len(region.outputs))],
        sources=[flat.places[source_of(call, region, i)] for i in range(len(region.outputs))] if region.sources else [],
        others={"time": flat.places[clock(program)], "step": flat.places[inserted(compute, "step")], **parameters},
    )


def insert_cond(program: ModelProgram) -> PassResult:
    """Add the `guarded` graph: the model with a `cond` in the place of each region, over explicit state.

    A region reuses where the step is not past its slot `reuse_until`. One arm holds the region, whatever the prologue
    computes for it alone, the indicator and the policy; the other the stand-ins. Weights are operands. Both arms return
    tensors of their own, of equal shapes and strides. The compute graph stays as it is.
    """
    if program.guarded is not None:
        return PassResult(program, False)
    plan = program.planned()
    flat = inline_calls(program.compute)
    slots = _slot_inputs(flat, program)
    parameters = parameter_inputs(program, flat.graph, plan.settings.way.parameters)
    users = program.signature.out_spec.num_leaves
    everything: Any = flat.graph.output_node().args[0]
    names = [slot.name for slot in plan.slots]
    for region in plan.regions:
        names += [region.slot("reuse_left"), *([region.slot("change")] if region.measured else [])]
    returned = dict(zip(names, everything[users:], strict=True))
    flat.graph.output_node().args = (tuple(everything[:users]),)
    found: dict[str, Node] = {}
    for region in plan.regions:
        found |= _insert(_parts(program, flat, region, slots, parameters, returned))
    output = flat.graph.output_node()
    behind = [found[slot.name] for slot in plan.guard_slots]
    changes = [found[region.slot("change")] for region in plan.regions if region.measured]
    with flat.graph.inserting_before(output):
        if len(changes) > 1:
            value = fake((len(plan.measured),), torch.float32, plan.device)
            changes = [_append(flat.graph, aten.cat.default, changes, name="change", value=value)]
    output.args = ((*output.args[0], *behind, *changes),)  # type: ignore[misc]
    eliminate_dead_code(flat.graph)
    return PassResult(program.replace(guarded=GraphModule(flat.attributes, flat.graph, "Guarded")), True)
