"""Turn the cache from buffers into a value that is passed in and returned."""

from __future__ import annotations

import torch
from torch.fx import Node

from bwcache_compile.errors import InvariantError
from bwcache_compile.ir.edit import CACHE, new_input
from bwcache_compile.ir.graph_text import format_node
from bwcache_compile.ir.program import ModelProgram, PassResult

_copy = torch.ops.aten.copy_.default


def _next_value(slot: str, reads: list[Node]) -> Node:
    """Return the value that a slot is given, after checking that it is given one once and not read later."""
    order = {node: i for i, node in enumerate(reads[0].graph.nodes)} if reads else {}
    writes = [user for node in reads for user in node.users if user.target is _copy and user.args[0] is node]
    if len(writes) != 1:
        raise InvariantError(f"lift_cache_state: the slot {slot} is written {len(writes)} times, not once.")
    late = [user for node in reads for user in node.users if order[user] > order[writes[0]]]
    # handing the old value on to another slot is no read: both writes take effect together, at the end of the step
    late = [user for user in late if user.target is not _copy]
    if late:
        raise InvariantError(f"lift_cache_state: the slot {slot} is read after it is written, at `{format_node(late[0])}`.")
    return writes[0].args[1]  # type: ignore[return-value]


def lift_cache_state(program: ModelProgram) -> PassResult:
    """Make every cache slot an explicit graph input and output.

    The graph reads slot `s` from input `cache_in_s` and returns its next value. Cache inputs follow the user inputs
    in plan order, only for slots that a computed step reads; cache outputs follow the user outputs in plan order, all
    of them; then the policy's outputs. After this pass no buffer holds cache state.

    Raises:
        InvariantError: A slot is not written exactly once, or read after it is written.
    """
    plan, module, graph = program.planned(), program.compute, program.compute.graph
    if not hasattr(module, CACHE):
        return PassResult(program, False)
    user_inputs = len(program.signature.inputs)
    user_outputs = program.signature.out_spec.num_leaves
    found = {slot.name: [n for n in graph.find_nodes(op="get_attr") if n.target == f"{CACHE}.{slot.name}"] for slot in plan.slots}
    next_values = {name: _next_value(name, reads) for name, reads in found.items()}
    anchor = graph.find_nodes(op="placeholder")[user_inputs - 1]
    inputs = {}
    for name, reads in found.items():
        with graph.inserting_after(anchor):
            anchor = inputs[name] = new_input(graph, f"cache_in_{name}", reads[0].meta["val"])
        next_values = {other: anchor if value in reads else value for other, value in next_values.items()}
        for node in reads:
            for user in [user for user in node.users if user.target is _copy and user.args[0] is node]:
                graph.erase_node(user)
            node.replace_all_uses_with(anchor)
            graph.erase_node(node)
    output = graph.output_node()
    returned = list(output.args[0])  # type: ignore[arg-type]
    output.args = ((*returned[:user_outputs], *next_values.values(), *returned[user_outputs:]),)
    for node in inputs.values():
        if not node.users:
            graph.erase_node(node)
    delattr(module, CACHE)
    return PassResult(program.replace(compute_slots=tuple(name for name, node in inputs.items() if node.users)), True)
