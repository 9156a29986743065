"""The rules that hold after every pass, checked over the graph and every graph it calls."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from bwcache_compile.errors import InvariantError
from bwcache_compile.graph_text import format_node
from bwcache_compile.program import OURS, REGION_MARK, CachedProgram


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


def _verify_specialized(program: CachedProgram, after: str) -> None:
    plan = program.planned()
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
    user = program.signature.out_spec.num_leaves
    for name, graph, expected in (
        ("compute", program.compute.graph, user + len(plan.slots) + len(plan.regions) * (2 if plan.measured else 1)),
        ("reuse", program.reuse.graph, user),
    ):
        outputs = graph.output_node().args[0]
        returned = len(outputs) if isinstance(outputs, (list, tuple)) else 1
        if returned != expected:
            _fail(after, f"the {name} graph returns {returned} values, not {expected}")


def verify(program: CachedProgram, after: str = "capture") -> None:
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
