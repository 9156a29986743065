"""Whether two units do the same, up to constants and to the weights they use."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Node

from bwcache_compile.ir.graph_text import format_value, op_name
from bwcache_compile.ir.sizes import shape_of
from bwcache_compile.passes.block_search.stacks import Unit


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def _operands(node: Node) -> list[Node | None]:
    """Return a node's operands in order; None where a constant stands."""
    flat = _leaves([*node.args, *node.kwargs.values()])
    return [item if isinstance(item, Node) else None for item in flat]


def _describe(node: Node) -> str:
    value = node.meta.get("val")
    name = "weight" if node.op == "get_attr" else node.name
    return f"{name} is {format_value(value) if isinstance(value, Tensor) else 'another value'}"


def difference(unit: Unit, other: Unit) -> str | None:
    """Say where `other` departs from `unit`, or None where they match.

    Two units match if they run the same operators in the same order, wire them alike, and take operands of the same
    shape and dtype from outside. Constants may differ, and so may what the outside operands are.
    """
    places = {node: i for i, node in enumerate(unit.nodes)}
    other_places = {node: i for i, node in enumerate(other.nodes)}
    for mine, theirs in zip(unit.nodes, other.nodes, strict=False):
        if str(mine.target) != str(theirs.target):
            return f"at node `{theirs.name}`: it runs {op_name(theirs)}, expected {op_name(mine)}"
        left, right = _operands(mine), _operands(theirs)
        if [x is None for x in left] != [x is None for x in right]:
            return f"at node `{theirs.name}`: different operands are constants"
        for want, got in zip(left, right, strict=True):
            if want is None or got is None:
                continue
            if places.get(want) != other_places.get(got):
                return f"at node `{theirs.name}`: operand `{got.name}` has another origin"
            a, b = want.meta.get("val"), got.meta.get("val")
            if want not in places and isinstance(a, Tensor) and isinstance(b, Tensor) and (shape_of(a), a.dtype) != (shape_of(b), b.dtype):
                return f"at node `{theirs.name}`: {_describe(got)}, expected {format_value(a)}"
    if len(unit.nodes) != len(other.nodes):
        return f"it runs {len(other.nodes)} operators, expected {len(unit.nodes)}"
    return None


def outside_operands(unit: Unit) -> list[Node]:
    """Return the operands that come from outside a unit, parameters left out, in order of first use."""
    inside = set(unit.nodes)
    seen = dict.fromkeys(a for node in unit.nodes for a in node.all_input_nodes)
    return [node for node in seen if node not in inside and node.op != "get_attr"]
