"""Decide in the graph how many of the following steps reuse."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from bwcache_compile import policy
from bwcache_compile.passes._edit import (
    call_traced,
    fake,
    graph_input,
    inserted,
    read_slot,
    result,
    slots_by_role,
    step_input,
    write_slot,
)
from bwcache_compile.program import CachedProgram, PassResult

SCHEDULE_INPUTS = ("threshold", "interval", "tail_numerator", "tail_denominator", "warmup", "num_steps")


def policy_inputs(program: CachedProgram) -> dict[str, Tensor]:
    """Return the policy's inputs by name, as values without data: float32 or int64, of shape [1], or [S] for a mask."""
    device = program.planned().device
    mask = program.planned().config.steps_mask
    if mask is not None:
        return {"policy_mask": fake((len(mask),), torch.int64, device)}
    dtypes = {"threshold": torch.float32}
    return {f"policy_{name}": fake((1,), dtypes.get(name, torch.int64), device) for name in SCHEDULE_INPUTS}


def insert_policy(program: CachedProgram) -> PassResult:
    """Return `reuse_left`, int64[1], as the output behind the user's; the parameters become inputs `policy_*`.

    With the paper's schedule the trigger is a slot, and the indicator per block is returned too, for the report.
    """
    plan, module, graph = program.planned(), program.compute, program.compute.graph
    parameters = [graph_input(graph, name, value) for name, value in policy_inputs(program).items()]
    step = step_input(program)
    output = graph.output_node()
    extra: list[Node]
    if plan.config.policy == "static":
        with graph.inserting_before(output):
            operands = [*parameters, step]
            left = call_traced(module, "policy", policy.static, operands, "reuse_left")
        extra = [left]
    else:
        (slot,) = slots_by_role(plan, "trigger")
        change = inserted(graph, "change")
        operands = [change, read_slot(program, slot), step, *parameters]
        with graph.inserting_before(output):
            call = call_traced(module, "policy", policy.schedule, operands)
            trigger, left = result(call, 0, "trigger"), result(call, 1, "reuse_left")
        write_slot(program, slot, trigger)
        extra = [left, change]
    output.args = ((*output.args[0], *extra),)  # type: ignore[misc]
    return PassResult(program, True)
