"""Turn writes in place into values, where that changes nothing else."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from bwcache_compile.dataflow import DataFlow, aliased_arguments
from bwcache_compile.graph_text import op_name
from bwcache_compile.program import CachedProgram, PassResult
from bwcache_compile.sizes import shape_of


def _by_value(node: Node) -> torch._ops.OpOverload | None:
    """Return the operator that returns what an elementwise write (`add_`, `mul_` ...) leaves, if it is of the same type."""
    target, written = node.target, node.args[0] if node.args else None
    if not isinstance(target, torch._ops.OpOverload) or not isinstance(written, Node) or torch.Tag.pointwise not in target.tags:
        return None
    packet = getattr(torch.ops.aten, op_name(node).removesuffix("_"), None)
    if packet is None or not op_name(node).endswith("_") or target._overloadname not in packet.overloads():
        return None
    operator: torch._ops.OpOverload = getattr(packet, target._overloadname)
    if any("val" not in operand.meta for operand in node.all_input_nodes):
        return None
    args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda operand: operand.meta["val"])
    before, after = written.meta.get("val"), operator(*args, **kwargs)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return None
    same = (shape_of(before), before.dtype, before.stride()) == (shape_of(after), after.dtype, after.stride())
    return operator if same else None


def _writes(root: Node, flow: DataFlow) -> dict[Node, torch._ops.OpOverload] | None:
    """Return each write to a value with its operator by value; None if one must stay, or a view would miss one."""
    found: dict[Node, torch._ops.OpOverload] = {}
    whole = {root}
    for node in flow.writers[root]:
        operator = _by_value(node)
        if operator is None or node.args[0] not in whole or aliased_arguments(node)[1] != [node.args[0]]:
            return None
        found[node] = operator
        whole.add(node)
    views = [node for node in flow.nodes if root in flow.roots[node] and node not in whole]
    for write in found:
        at = flow.index[write]
        if any(flow.index[view] < at and any(flow.index[user] > at for user in view.users) for view in views):
            return None
    return found


def return_writes(program: CachedProgram) -> PassResult:
    """Leave no elementwise write to a value of the graph's own that can be an operator that returns a new value.

    `x += f(x)` in a block writes to what stood before the blocks, so that a reused step would miss the write; as
    `y = x + f(x)` it is an output like any other. A value is left alone if a view of it outlives a write, if one of its
    writes has no such form, or if it belongs to the caller. The same kernels run on the same numbers.
    """
    flow = DataFlow(program.compute.graph)
    modified = False
    for root in flow.writers:
        found = _writes(root, flow) if root.op == "call_function" and flow.roots[root] == frozenset({root}) else None
        latest = root
        for write, operator in (found or {}).items():
            write.target = operator
            for user in [user for user in latest.users if flow.index[user] > flow.index[write]]:
                user.replace_input_with(latest, write)
            latest = write
            modified = True
    return PassResult(program, modified)
