"""Decide in the graph how many of the following steps reuse."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from bwcache_compile import policy
from bwcache_compile.config import policy_dtype
from bwcache_compile.passes._edit import call_traced, fake, graph_input, inserted, read_slot, result, step_input, write_slot
from bwcache_compile.program import CachedProgram, PassResult, Region


def policy_inputs(program: CachedProgram) -> dict[str, Tensor]:
    """Return the policy's inputs by name, as values without data: float32 or int64, of shape [1], or [S] for a mask."""
    plan = program.planned()
    values = plan.config.policy_values(plan.config.steps or 1)  # the number of steps is a value like the others, and may be known later
    return {f"policy_{name}": fake((len(v),), getattr(torch, policy_dtype(name)), plan.device) for name, v in values.items()}


def _decide(program: CachedProgram, region: Region, parameters: list[Node], step: Node) -> list[Node]:
    """Insert one region's decision; return `reuse_left` and, where measured, `change`."""
    plan, module, graph = program.planned(), program.compute, program.compute.graph
    name, left = region.slot("policy"), region.slot("reuse_left")
    if plan.config.policy == "static":
        with graph.inserting_before(graph.output_node()):
            return [call_traced(module, name, policy.static, [*parameters, step], left)]
    (slot,) = (slot for slot in plan.slots if slot.name == region.slot("trigger"))
    change = inserted(graph, region.slot("change"))
    operands = [change, read_slot(program, slot), step, *parameters]
    with graph.inserting_before(graph.output_node()):
        call = call_traced(module, name, policy.schedule, operands)
        trigger, remaining = result(call, 0, slot.name), result(call, 1, left)
    write_slot(program, slot, trigger)
    return [remaining, change]


def insert_policy(program: CachedProgram) -> PassResult:
    """Return `reuse_left`, int64[1], as the output behind the user's; the parameters become inputs `policy_*`.

    With the paper's schedule the trigger is a slot, and the indicator per block is returned too, for the report. With
    guards per block there is one pair of outputs for each.
    """
    graph = program.compute.graph
    parameters = [graph_input(graph, name, value) for name, value in policy_inputs(program).items()]
    step = step_input(program)
    extra = [node for region in program.planned().regions for node in _decide(program, region, parameters, step)]
    output = graph.output_node()
    output.args = ((*output.args[0], *extra),)  # type: ignore[misc]
    return PassResult(program, True)
