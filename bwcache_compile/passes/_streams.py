"""Following one stream of tokens: which of several live-outs reaches the output, and what it continues."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

aten = torch.ops.aten
# Per token: row i of the result needs row i of the operands that have as many rows, and all of the others.
_TOKENWISE = {
    "add", "sub", "mul", "div", "neg", "layer_norm", "rms_norm", "linear", "gelu", "silu", "tanh", "to", "type_as",
    "_to_copy", "pow", "rsqrt", "sigmoid", "contiguous", "clone", "native_layer_norm",
}  # fmt: skip
_LAYOUT = {
    "view", "reshape", "permute", "transpose", "unsqueeze", "squeeze", "flatten", "unflatten", "contiguous", "clone",
    "expand", "slice", "to", "type_as", "_to_copy", "split_with_sizes", "split", "chunk", "getitem", "narrow", "cat",
    "select", "stack",
}  # fmt: skip


def _name(node: Node) -> str:
    target = node.target
    return target._schema.name.removeprefix("aten::") if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", "")


def _rows(node: Node) -> int | None:
    value = node.meta.get("val")
    return int(value.shape[1]) if isinstance(value, Tensor) and value.dim() == 3 and isinstance(value.shape[1], int) else None


def needed_rows(graph: Graph) -> dict[Node, tuple[int, int] | None]:
    """Work out, from the outputs back, which slice of dimension 1 of each value is needed.

    Returns:
        A (start, stop) slice where it is proved for a three-dimensional value; None where the whole value may be
        needed. Values that no output needs are left out.
    """
    needs: dict[Node, tuple[int, int] | None] = {}

    def add(node: Node, rows: tuple[int, int] | None) -> None:
        length = _rows(node)
        if rows is None and length is not None:
            rows = (0, length)
        if node in needs:
            old = needs[node]
            rows = (min(old[0], rows[0]), max(old[1], rows[1])) if old and rows else None
        needs[node] = rows

    for node in reversed(graph.nodes):
        if node.op == "output":
            for operand in node.all_input_nodes:
                add(operand, None)
        if node not in needs:
            continue
        rows, name = needs[node], _name(node)
        if rows is not None and name == "slice" and node.args[1] == 1 and len(node.args) < 5:
            start = int(node.args[2] or 0) if len(node.args) > 2 else 0
            length = _rows(node.args[0])
            start = start + length if start < 0 and length is not None else start
            add(node.args[0], (start + rows[0], start + rows[1]))
        elif rows is not None and name == "cat" and len(node.args) > 1 and node.args[1] in (1, -2):
            offset = 0
            for part in node.all_input_nodes:
                length = _rows(part)
                low, high = max(rows[0] - offset, 0), min(rows[1] - offset, length or 0)
                if low < high:
                    add(part, (low, high))
                offset += length or 0
        else:
            for operand in node.all_input_nodes:
                add(operand, rows if name in _TOKENWISE and rows is not None and _rows(operand) == _rows(node) else None)
    return needs


def _addends(node: Node) -> list[Node]:
    """Return the operands whose values stand unchanged in a sum, a re-arrangement or a cast."""
    name = _name(node)
    shape = getattr(node.meta.get("val"), "shape", None)
    if name in ("add", "sub", "add_", "sub_") and node.kwargs.get("alpha", 1) == 1:
        sides = node.args[:2] if name.startswith("add") else node.args[:1]
        return [a for a in sides if isinstance(a, Node) and getattr(a.meta.get("val"), "shape", None) == shape]
    if name in _LAYOUT:
        return node.all_input_nodes if name in ("cat", "stack") else node.all_input_nodes[:1]
    return []


def continued(node: Node, candidates: Collection[Node]) -> list[Node]:
    """Return the candidates that a value continues: reached backwards through residual sums and re-arrangements alone."""
    found: list[Node] = []
    seen: set[Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current in candidates and current is not node:
            found.append(current)
        else:
            stack += _addends(current)
    return found


def _replay(node: Node, places: dict[Node, Any]) -> Any:
    """Run a re-arrangement on element numbers instead of values; -1 marks what comes from elsewhere."""

    def lookup(argument: Node) -> Any:
        if places.get(argument) is not None:
            return places[argument]
        value = argument.meta["val"]
        return torch.full(tuple(value.shape), -1, dtype=torch.int32) if isinstance(value, Tensor) else None

    if _name(node) in ("to", "type_as", "_to_copy"):
        return lookup(node.all_input_nodes[0])
    args = torch.fx.node.map_arg(node.args, lookup)
    kwargs = torch.fx.node.map_arg(node.kwargs, lookup)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def same_places(graph: Graph, output: Node, source: Node) -> bool:
    """Prove that element i of `output` is element i of `source` plus something, for every i.

    Equal shapes prove nothing: rows and columns may have been exchanged on the way. So the element numbers of `source`
    are sent along the residual path through every re-arrangement, and must come out in order.
    """
    if getattr(output.meta.get("val"), "shape", 0) != getattr(source.meta.get("val"), "shape", 1):
        return False
    value = source.meta["val"]
    places: dict[Node, Any] = {source: torch.arange(value.numel(), dtype=torch.int32).view(tuple(value.shape))}
    for node in graph.nodes:
        if node is source:
            continue
        addends = [a for a in _addends(node) if places.get(a) is not None]
        if not addends:
            continue
        name = _name(node)
        if name in _LAYOUT:
            places[node] = _replay(node, places)
        elif len(addends) == 1:
            places[node] = places[addends[0]]
        else:  # x + x is no residual; x + y where both carry the stream is ambiguous unless they agree nowhere
            left, right = (places[a] for a in addends)
            both = (left >= 0) & (right >= 0)
            places[node] = torch.where(both, -1, torch.maximum(left, right))
        if node is output:
            break
    got = places.get(output)
    return isinstance(got, Tensor) and bool(torch.equal(got, places[source]))
