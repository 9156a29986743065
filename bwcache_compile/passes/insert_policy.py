"""Decide in the graph how many of the following steps reuse."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from bwcache_compile.ir.edit import (
    call_traced,
    check_results,
    inserted,
    read_slot,
    result,
    slot_value,
    write_slot,
)
from bwcache_compile.ir.own_inputs import own_value, parameter_inputs, step_input
from bwcache_compile.ir.plan import Region
from bwcache_compile.ir.program import ModelProgram, PassResult
from bwcache_compile.ir.samples import each_sample
from bwcache_compile.ir.torch_compat import pytree
from bwcache_compile.policies import POLICIES
from bwcache_compile.policies.definitions import takes


def _deciding(decision: Callable[..., Any]) -> Any:
    """Return a policy's decision with results of their own: no output of a graph is one of its inputs."""

    @functools.wraps(decision)
    def decide(*values: Tensor) -> Any:
        returned = decision(*values)
        return pytree.tree_map_only(Tensor, lambda r: r.clone() if any(r is value for value in values) else r, returned)

    return decide


def _one_or_all(function: Callable[..., tuple[Tensor, ...]], several: Sequence[Any]) -> Callable[..., Any]:
    """Return a function whose only result is no tuple, unless there are several."""
    return function if several else lambda *values: function(*values)[0]


def _decide(program: ModelProgram, region: Region, named: dict[str, Node]) -> list[Node]:
    """Insert one region's decision; return `reuse_left` and, where measured, `change`."""
    plan, module, graph = program.planned(), program.compute, program.compute.graph
    policy, slots = POLICIES[plan.settings.policy], {slot.name: slot for slot in plan.slots}
    own, left = [slots[region.slot(slot.name)] for slot in policy.slots], region.slot("reuse_left")
    changes = [inserted(graph, region.slot("change"))] if region.measured else []
    named = {**named, **{slot.role: read_slot(program, slot) for slot in own}, **dict(zip(["change"], changes, strict=False))}
    operands, decision, name = [named[name] for name in takes(policy.decide)], policy.decide, f"policy={plan.settings.policy!r}: `decide`"
    if plan.settings.batch_reduce == "per_sample":
        operands, decision = [named["step"], *operands], _one_or_all(each_sample(policy.decide, name), own)
    with graph.inserting_before(graph.output_node()):
        call = call_traced(module, region.slot("policy"), _deciding(decision), operands, None if own else left)
        returned = [result(call, i, slot.name) for i, slot in enumerate(own)]
        remaining = result(call, len(own), left) if own else call
    expected = [*(slot_value(program, slot) for slot in own), own_value(program, (1,), torch.int64)]
    check_results(name, [*returned, remaining], expected)
    for slot, following in zip(own, returned, strict=True):
        write_slot(program, slot, following)
    return [remaining, *changes]


def insert_policy(program: ModelProgram) -> PassResult:
    """Return `reuse_left`, int64[1], as the output behind the user's; the parameters become inputs `policy_*`.

    What the policy keeps are slots (with the paper's schedule, the trigger), and what was measured is returned too, for the
    report. With guards per block there is one pair of outputs for each.
    """
    graph = program.compute.graph
    named = parameter_inputs(program, graph, POLICIES[program.planned().settings.policy].parameters)
    named["step"] = step_input(program)
    extra = [node for region in program.planned().regions for node in _decide(program, region, named)]
    output = graph.output_node()
    output.args = ((*output.args[0], *extra),)  # type: ignore[misc]
    return PassResult(program, True)
