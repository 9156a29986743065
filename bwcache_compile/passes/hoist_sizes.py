"""Work every dynamic size out once, at the start of the graph."""

from __future__ import annotations

from torch import SymBool, SymFloat, SymInt
from torch.fx import Node
from torch.fx.node import map_arg

from bwcache_compile.ir.dataflow import eliminate_dead_code
from bwcache_compile.ir.edit import is_early, move_early, size_node
from bwcache_compile.ir.program import ModelProgram, PassResult
from bwcache_compile.ir.sizes import size_of
from bwcache_compile.size_expressions import names_in

_SYMBOLIC = (SymInt, SymFloat, SymBool)


def _replace(node: Node, value: Node | int) -> None:
    """Let every user of a node take a value instead."""
    for user in list(node.users):
        user.args = map_arg(user.args, lambda operand: value if operand is node else operand)
        user.kwargs = map_arg(user.kwargs, lambda operand: value if operand is node else operand)


def hoist_sizes(program: ModelProgram) -> PassResult:
    """Leave one node for each dynamic size, all of them before the first operator on tensors.

    An exporter creates a size where it is first needed: in the first block, which then differs from its siblings and
    hands the size on to them. Every size is arithmetic on the sizes of the inputs, so all of them are worked out from
    those, and numbers made from sizes follow. A size that depends on values of tensors stays where it is.
    """
    graph = program.compute.graph
    known = {symbol.name for symbol in program.signature.sizes.symbols} if program.signature.sizes else set()
    found = [n for n in graph.nodes if n.op == "call_function" and isinstance(n.meta.get("val"), _SYMBOLIC) and not is_early(n)]
    for node in found:
        size = size_of(node.meta["val"]) if isinstance(node.meta["val"], SymInt) else None
        if isinstance(size, int) or (size is not None and set(names_in(size)) <= known):
            _replace(node, size_node(program, size))
        elif all(is_early(operand) for operand in node.all_input_nodes):
            move_early(node)
    return PassResult(program, eliminate_dead_code(graph) or bool(found))
