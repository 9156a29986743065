"""Check the rules that hold after every pass, for the graph and every graph that it calls."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from bwcache_compile.errors import InvariantError
from bwcache_compile.ir.graph_text import called_graphs, format_node
from bwcache_compile.ir.program import OURS, REGION_MARK, ModelProgram


def _neighbourhood(node: Node) -> str:
    nodes = [n for n in node.graph.nodes if n.op != "get_attr"]
    at = nodes.index(node) if node in nodes else 0
    lines = [("> " if n is node else "  ") + format_node(n) for n in nodes[max(0, at - 5) : at + 6]]
    return "\n".join(lines)


def _shown(node: Node) -> str:
    return str(node.target).removeprefix(OURS)


def _fail(after: str, reason: str, node: Node | None = None) -> None:
    place = f"\n{_neighbourhood(node)}" if node is not None else ""
    raise InvariantError(f"after {after}: {reason}. This is a bug in bwcache-compile, please report it.{place}")


def _verify_graph(module: GraphModule, after: str) -> None:
    try:
        module.graph.lint()
    except RuntimeError as error:
        _fail(after, f"the graph is malformed: {str(error).splitlines()[0]}")
    for node in module.graph.nodes:
        if node.op == "call_module":
            inner = module.get_submodule(str(node.target))
            if not isinstance(inner, GraphModule):
                _fail(after, f"{_shown(node)} is a {type(inner).__name__}, not a graph", node)
            elif len(node.args) != len(inner.graph.find_nodes(op="placeholder")):
                _fail(after, f"{_shown(node)} is called with {len(node.args)} operands", node)
            else:
                _verify_graph(inner, after)
        elif node.op == "call_method":
            _fail(after, "a method is called where an operator is expected", node)
        if node.op == "call_function" and node.users and "val" not in node.meta:
            _fail(after, f"{node.name} has no recorded value", node)


def _verify_specialized(program: ModelProgram, after: str) -> None:
    for module in (program.compute, program.reuse):
        assert module is not None
        for node in module.graph.nodes:
            if node.op == "get_attr" and str(node.target).startswith(f"{OURS}cache."):
                _fail(after, f"the state {_shown(node)} is still a buffer", node)
    assert program.reuse is not None
    for inner in program.reuse.modules():
        for node in inner.graph.nodes if isinstance(inner, GraphModule) else ():
            if node.meta.get(REGION_MARK):
                _fail(after, f"{node.name} of a cached block runs on a reused step", node)
    for kind in ("compute", "reuse"):
        _verify_ends(program, kind, after)


def _verify_ends(program: ModelProgram, kind: str, after: str) -> None:
    """Check that a graph has as many inputs and outputs as `graph_io` names."""
    io, graph = program.io(kind), getattr(program, kind).graph
    outputs = graph.output_node().args[0]
    returned, taken = len(outputs) if isinstance(outputs, (list, tuple)) else 1, len(graph.find_nodes(op="placeholder"))
    if returned != len(io.outputs):
        _fail(after, f"the {kind} graph returns {returned} values, not {len(io.outputs)}")
    if taken != len(io.inputs):
        _fail(after, f"the {kind} graph takes {taken} values, not {len(io.inputs)}")


def _layout(value: Tensor) -> list[tuple[int, int | None]]:
    """Return sizes and strides; the stride of a single row means nothing."""
    return [(size, stride if size != 1 else None) for size, stride in zip(value.shape, value.stride(), strict=True)]


def _verify_cond(module: GraphModule, node: Node, after: str) -> None:
    """Check that both arms take the operands and return tensors of equal shapes, dtypes and strides."""
    (_, reusing), (_, computing) = called_graphs(module, node)
    operands = node.args[3]
    assert isinstance(operands, (list, tuple))
    for arm in (reusing, computing):
        _verify_graph(arm, after)
        if len(arm.graph.find_nodes(op="placeholder")) != len(operands):
            _fail(after, f"{node.name} passes {len(operands)} operands to an arm that takes another number", node)
    kept, made = reusing.graph.output_node().all_input_nodes, computing.graph.output_node().all_input_nodes
    if len(kept) != len(made):
        _fail(after, f"the arms of {node.name} return {len(kept)} and {len(made)} values", node)
    for ours, theirs in zip(kept, made, strict=True):
        a, b = ours.meta["val"], theirs.meta["val"]
        if (a.dtype, _layout(a)) != (b.dtype, _layout(b)):
            _fail(after, f"{node.name} returns `{ours.name}` where it reuses and another layout, `{theirs.name}`, where it computes", node)
    for marked in reusing.graph.nodes:
        if marked.meta.get(REGION_MARK):
            _fail(after, f"{marked.name} of a cached block runs on a reused step", marked)


def _verify_guarded(program: ModelProgram, after: str) -> None:
    plan, guarded = program.planned(), program.guarded
    assert guarded is not None
    _verify_graph(guarded, after)
    guards = [node for node in guarded.graph.nodes if node.target is torch.ops.higher_order.cond and node.name.startswith("guard")]
    if len(guards) != len(plan.regions):
        _fail(after, f"{len(guards)} guards for {len(plan.regions)} regions")
    for node in guards:
        _verify_cond(guarded, node, after)
    for node in guarded.graph.nodes:
        if node.meta.get(REGION_MARK):
            _fail(after, f"{node.name} of a cached block runs outside its guard", node)
    _verify_ends(program, "guarded", after)


def verify(program: ModelProgram, after: str = "capture") -> None:
    """Check a program.

    Args:
        program: The program to check; nothing is changed.
        after: Name of the pass that ran last, for the message.

    Raises:
        InvariantError: A rule does not hold. The message shows the node with five lines on either side.
    """
    _verify_graph(program.compute, after)
    for name, tensor in program.compute.named_buffers():
        if tensor.device == torch.device("meta") and not name.startswith(f"{OURS}cache."):
            _fail(after, f"the buffer {name} has no data")
    if program.reuse is not None:
        _verify_graph(program.reuse, after)
        _verify_specialized(program, after)
    if program.guarded is not None:
        _verify_guarded(program, after)
