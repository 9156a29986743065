"""Following one stream of tokens: which inputs it comes from, which live-out reaches the output, and what that continues."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import torch
from torch import SymInt, Tensor
from torch.fx import Graph, Node

from bwcache_compile.ir.dataflow import DataFlow
from bwcache_compile.ir.sizes import Shape, at_most, shape_of, size_of
from bwcache_compile.ir.torch_compat import OpOverload

aten = torch.ops.aten
# Per token: row i of the result needs row i of the operands that have as many rows, and all of the others.
_TOKENWISE = {
    "add", "sub", "mul", "div", "neg", "layer_norm", "rms_norm", "linear", "gelu", "silu", "tanh", "to", "type_as",
    "_to_copy", "pow", "rsqrt", "sigmoid", "contiguous", "clone", "native_layer_norm",
}  # fmt: skip
_ELEMENTWISE = _TOKENWISE - {"layer_norm", "rms_norm", "native_layer_norm", "linear"} | {"add_", "sub_", "mul_", "div_"}
_FIRST_HOLDS_TOKENS = {"layer_norm", "rms_norm", "native_layer_norm", "group_norm", "linear"}
LAYOUT = {
    "view", "reshape", "permute", "transpose", "unsqueeze", "squeeze", "flatten", "unflatten", "contiguous", "clone",
    "expand", "slice", "to", "type_as", "_to_copy", "split_with_sizes", "split", "chunk", "getitem", "narrow", "cat",
    "select", "stack", "slice_scatter", "select_scatter",
}  # fmt: skip

# Which operands stand unchanged in a result: `lerp` is start + weight * (end - start), `copy` the functional form of `copy_`.
_UNCHANGED = {
    **dict.fromkeys(("add", "add_"), slice(2)),
    **dict.fromkeys(("sub", "sub_", "lerp", "addcmul"), slice(1)),
    "copy": slice(1, 2),
}


def operator_name(node: Node) -> str:
    """Return the name of an operator without its namespace and overload."""
    target = node.target
    return target._schema.name.removeprefix("aten::") if isinstance(target, OpOverload) else getattr(target, "__name__", "")


def layout_operator(node: Node) -> Callable[..., Any]:
    """Return the operator that does what a node of `LAYOUT` does with an operand of any strides: `reshape` for `view`."""
    assert callable(node.target)
    return aten.reshape.default if node.target is aten.view.default else node.target


Rows = tuple[int | SymInt, int | SymInt]


def _rows(node: Node) -> int | SymInt | None:
    value = node.meta.get("val")
    return value.shape[1] if isinstance(value, Tensor) and value.dim() == 3 else None


def _number(argument: Any) -> int | SymInt:
    """Return the value of an operand that is a number, open or not."""
    value = argument.meta["val"] if isinstance(argument, Node) else argument
    return value if isinstance(value, SymInt) else int(value or 0)


def _order(left: int | SymInt, right: int | SymInt) -> tuple[int | SymInt, int | SymInt] | None:
    """Return two sizes, the smaller first; None where that differs from call to call."""
    return (left, right) if at_most(left, right) else (right, left) if at_most(right, left) else None


def _cover(one: Rows | None, other: Rows | None) -> Rows | None:
    """Return the slice that covers two, where that can be told for every size."""
    if one is None or other is None:
        return None
    low, high = _order(one[0], other[0]), _order(one[1], other[1])
    return (low[0], high[1]) if low and high else None


def _overlap(rows: Rows, offset: int | SymInt, length: int | SymInt) -> Rows | Literal["unknown"] | None:
    """Return the part of a slice that falls on rows `offset` .. `offset + length`, counted from there; None for no part."""
    low, high = _order(rows[0] - offset, 0), _order(rows[1] - offset, length)
    if low is None or high is None:
        return "unknown"
    if at_most(high[0], low[1]):
        return None
    return (low[1], high[0]) if at_most(low[1] + 1, high[0]) else "unknown"


def needed_rows(graph: Graph, operands_of: Callable[[Node], Sequence[Node]] | None = None) -> dict[Node, Rows | None]:
    """Work out, from the outputs back, which slice of dimension 1 of each value is needed.

    Args:
        graph: The whole model.
        operands_of: Which operands of a node to follow; all, where this is not given.

    Returns:
        A (start, stop) slice where it is proved, for every size that the program admits, for a three-dimensional
        value; None where the whole value may be needed. Values that no output needs are left out.
    """
    needs: dict[Node, Rows | None] = {}

    def add(node: Node, rows: Rows | None) -> None:
        length = _rows(node)
        if rows is None and length is not None:
            rows = (0, length)
        needs[node] = _cover(needs[node], rows) if node in needs else rows

    for node in reversed(graph.nodes):
        if node.op == "output":
            for operand in node.all_input_nodes:
                add(operand, None)
        if node not in needs:
            continue
        rows, name = needs[node], operator_name(node)
        followed = node.all_input_nodes if operands_of is None else operands_of(node)
        if rows is not None and name == "slice" and node.args[1] == 1 and len(node.args) < 5:
            start = _number(node.args[2]) if len(node.args) > 2 else 0
            length = _rows(node.args[0])
            if length is not None and at_most(start, -1):
                start = start + length
            add(node.args[0], (start + rows[0], start + rows[1]) if at_most(0, start) else None)
        elif rows is not None and name == "cat" and len(node.args) > 1 and node.args[1] in (1, -2):
            offset: int | SymInt = 0
            for part in node.args[0]:
                rows_of_part = _rows(part)
                length = 0 if rows_of_part is None else rows_of_part  # not `or`: a size that depends on values has no truth
                wanted = _overlap(rows, offset, length)
                if wanted is not None:
                    add(part, None if wanted == "unknown" else wanted)
                offset = offset + length
        else:
            for operand in followed:
                alike = name in _TOKENWISE and rows is not None and _same_size(_rows(operand), _rows(node))
                add(operand, rows if alike else None)
    return needs


def _same_size(left: int | SymInt | None, right: int | SymInt | None) -> bool:
    return left is not None and right is not None and size_of(left) == size_of(right)


def _along_the_stream(node: Node, flow: DataFlow) -> list[Node]:
    """Return the operands that hold the tokens of a value, conditions and weights left out."""
    name, operands = operator_name(node), [a for a in node.all_input_nodes if isinstance(a.meta.get("val"), Tensor)]
    if name in _FIRST_HOLDS_TOKENS or "attention" in name or name.startswith("conv"):
        return operands[:1]
    if name in _ELEMENTWISE:
        operands = [a for a in operands if a.op != "get_attr" and _shape(a) == _shape(node)] or operands
    if name in ("add", "add_", "sub", "sub_") and len(operands) == 2:
        for one, other in (operands, operands[::-1]):
            if flow.ancestors[other] >> flow.index[one] & 1:  # x + f(x) continues x
                return [one]
    return operands


def input_stream(graph: Graph, flow: DataFlow) -> set[Node]:
    """Return the inputs that the output's tokens come from: the latents, where text and conditions can be told from them.

    Tokens are followed from the output back: through sums `x + f(x)` to `x`, through an attention to its queries, through a
    concatenation to the rows that the output takes. Where that does not tell, more inputs than these are returned.
    """
    needs = needed_rows(graph, lambda node: _along_the_stream(node, flow))
    return {node for node in graph.find_nodes(op="placeholder") if node in needs and is_token_input(node)}


def is_token_input(node: Node) -> bool:
    """Whether an input can hold tokens."""
    value = node.meta.get("val")
    return node.op == "placeholder" and isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1


def _shape(node: Node) -> Shape | None:
    value = node.meta.get("val")
    return shape_of(value) if isinstance(value, Tensor) else None


def addends(node: Node) -> list[Node]:
    """Return the operands whose values stand unchanged in a sum, a re-arrangement or a cast."""
    name = operator_name(node)
    if name in _UNCHANGED and node.kwargs.get("alpha", 1) == 1:
        return [a for a in node.args[_UNCHANGED[name]] if isinstance(a, Node) and _shape(a) == _shape(node)]
    if name in LAYOUT:
        return node.all_input_nodes if name in ("cat", "stack", "slice_scatter", "select_scatter") else node.all_input_nodes[:1]
    return []


def merged_skip(node: Node) -> list[Node]:
    """Return the values of a long skip: those that a linear layer takes joined along channels, each of the shape that it returns.

    U-ViT, HunyuanDiT and Hunyuan3D bring the output of an early block back into a late one so: `linear(cat([x, skip], -1))`, with a
    norm before or after the linear layer.
    """

    def without_norms(value: Node) -> Node:
        while operator_name(value) in ("layer_norm", "rms_norm", "to", "type_as", "_to_copy"):
            value = value.all_input_nodes[0]
        return value

    linear = without_norms(node)
    if operator_name(linear) != "linear":
        return []
    joined, rank = without_norms(linear.all_input_nodes[0]), len(_shape(node) or ())
    if operator_name(joined) != "cat" or len(joined.args) < 2 or joined.args[1] not in (-1, rank - 1):
        return []
    parts = joined.all_input_nodes
    return parts if len(parts) > 1 and all(_shape(part) == _shape(node) for part in parts) else []


def merged_stream(node: Node, flow: DataFlow) -> list[Node]:
    """Return the stream that a long skip is merged into: the only one of the merged values that is made of all the others.

    What the linear layer returns takes the stream's place: it has the stream's shape, each of its tokens is made of the stream's token at
    the same place, and later blocks add to it as earlier ones added to the stream.
    """
    parts = merged_skip(node)
    others = flow.mask(parts)
    return [part for part in parts if flow.ancestors[part] & others == others]


def continued(node: Node, candidates: Collection[Node], flow: DataFlow | None = None) -> list[Node]:
    """Return the candidates that a value continues: reached backwards through residual sums and re-arrangements alone.

    Args:
        node: The value.
        candidates: What it may continue.
        flow: Of the graph, to go on with the stream where a linear layer merges a long skip into it.
    """
    return [value for value in _residual_path(node, flow, candidates) if value in candidates and value is not node]


def _residual_path(node: Node, flow: DataFlow | None, ends: Collection[Node] = ()) -> list[Node]:
    """Return what a value continues, itself first, through residual sums and re-arrangements; what `ends` holds is not followed further.

    With the flow of the graph, merged skips are gone through as well.
    """
    seen: dict[Node, None] = {}
    stack = [node]
    while stack:
        current = stack.pop()
        if current not in seen:
            seen[current] = None
            if current is node or current not in ends:
                stack += addends(current) or (merged_stream(current, flow) if flow is not None else [])
    return list(seen)


def leaves_the_stream(stream: Node, inputs: set[Node], own: set[Node], earlier: int, every: int, flow: DataFlow) -> bool:
    """Whether a block's residual path goes on with what no block has changed, at a sum whose other side earlier blocks made.

    That side is the stream; where it cannot be followed to an input, what is added to it, such as a hint, is not what it continues.

    Args:
        stream: What the block returns.
        inputs: Of the region.
        own: The nodes of the block.
        earlier: Mask of the nodes of the blocks before it.
        every: Mask of the nodes of all blocks.
        flow: Of the graph.
    """
    for value in _residual_path(stream, flow):
        sides = [] if operator_name(value) in LAYOUT else addends(value)
        untouched = [side for side in sides if not flow.ancestors[side] & every]
        followed = [side for side in sides if side not in own and flow.ancestors[side] & earlier]
        if untouched and any(side not in inputs and not continued(side, inputs, flow) for side in followed):
            return True
    return False


def path_ends(node: Node, region: Collection[Node], flow: DataFlow) -> list[Node]:
    """Return the nodes of a region where a value's residual path, followed backwards, ends before an input of the region."""
    ends: list[Node] = []
    seen: set[Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen or current not in region:
            continue
        seen.add(current)
        sides = addends(current) or merged_stream(current, flow)
        streams = [a for a in sides if operator_name(current) not in LAYOUT and all(flow.ancestors[b] >> flow.index[a] & 1 for b in sides)]
        stack += streams or sides  # x + f(x) continues x
        ends += [] if sides else [current]
    return sorted(ends, key=flow.index.__getitem__)
