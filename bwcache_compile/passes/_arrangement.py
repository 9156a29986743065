"""What a value continues: inputs of a region, put together as the region puts them together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Node

from bwcache_compile.ir.dataflow import DataFlow
from bwcache_compile.ir.sizes import Shape, hint, hint_shape, shape_of
from bwcache_compile.passes.block_search.streams import LAYOUT, addends, layout_operator, merged_stream, operator_name

_ELSEWHERE, _TWICE = -1, -2


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """Inputs of a region, joined, cut and permuted.

    Attributes:
        node: An input, or one of the region's own re-arrangements.
        copied: The re-arrangements that lead to it, in order, each with what stands for its operands: inputs, or others of these.
    """

    node: Node
    copied: dict[Node, dict[Node, Node]]


class _Numbered:
    """Element numbers of a region's inputs, sent along the residual path.

    Each input's elements have numbers of their own, those that enter the first block the smaller ones. Dynamic sizes take part
    with the values they were captured at. Values of one shape at every size and of equal numbers are one value, whatever blocks
    have added to it meanwhile; the first of them stands for all. `merges` counts the long skips merged into a value.
    """

    def __init__(self, flow: DataFlow, entered: Sequence[Node], late: Sequence[Node]) -> None:
        self.flow = flow
        self.places: dict[Node, Any] = {}
        self.first: dict[Node, Node] = {}
        self.merges: dict[Node, int] = {}
        self._distinct: dict[Shape, list[tuple[Tensor, Node]]] = {}
        count = self.limit = 0
        for number, node in enumerate([*entered, *late]):
            shape = torch.Size(hint_shape(node.meta["val"]))
            self.merges[node] = 0
            self._settle(node, torch.arange(count, count + shape.numel(), dtype=torch.int32).view(shape))
            count += shape.numel()
            if number < len(entered):
                self.limit = count

    def _settle(self, node: Node, places: Any) -> None:
        self.places[node], self.first[node] = places, node
        if isinstance(places, Tensor):
            known = self._distinct.setdefault(shape_of(node.meta["val"]), [])
            same = next((pair for pair in known if pair[0] is places or torch.equal(pair[0], places)), None)
            if same is None:
                known.append((places, node))
            else:
                self.places[node], self.first[node] = same

    def _replay(self, node: Node) -> Any:
        """Run a re-arrangement on element numbers instead of values."""

        def lookup(argument: Node) -> Any:
            if self.places.get(argument) is not None:
                return self.places[argument]
            value = argument.meta["val"]
            if isinstance(value, SymInt):
                return hint(value)
            return torch.full(hint_shape(value), _ELSEWHERE, dtype=torch.int32) if isinstance(value, Tensor) else None

        if operator_name(node) in ("to", "type_as", "_to_copy"):
            return lookup(node.all_input_nodes[0])
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lookup)
        return layout_operator(node)(*args, **kwargs)

    def _side(self, side: Node, sides: list[Node]) -> Tensor:
        """Return the numbers of one side of a sum; of `x + f(x)`, those of x."""
        places: Tensor = self.places[side]
        continues = all(self.flow.ancestors[other] >> self.flow.index[side] & 1 for other in sides)
        if continues or not bool((places >= self.limit).any()):
            return places
        return torch.where(places >= self.limit, _ELSEWHERE, places)  # what is only added on the way: a hint

    def _sum(self, sides: list[Node]) -> Tensor:
        first, *others = sorted((side for side in sides if self.places.get(side) is not None), key=self.merges.__getitem__)
        left = self._side(first, sides)
        for side in others:
            right, again = self._side(side, sides), self.merges[side] == self.merges[first]
            stream, other = (left >= 0) & (left < self.limit), (right >= 0) & (right < self.limit)
            # x + x continues nothing, whatever is added to it; x + merge(x, skip) holds x once
            twice = (stream & other & (again | (left != right))) | (left == _TWICE) | (right == _TWICE)
            left = torch.where(twice, _TWICE, torch.where(stream, left, torch.where(other, right, torch.maximum(left, right))))
        return left

    def visit(self, node: Node) -> None:
        """Number a value, if it continues one that is numbered."""
        summed = addends(node)
        sides = summed or merged_stream(node, self.flow)
        merges = [self.merges[side] for side in sides if self.places.get(side) is not None]
        if node in self.places or not merges:
            return
        self.merges[node] = min(merges) + (not summed)
        self._settle(node, self._replay(node) if operator_name(node) in LAYOUT else self._sum(sides))


def arrangement(
    flow: DataFlow, region: Sequence[Node], inputs: Sequence[Node], entered: Sequence[Node], output: Node
) -> Arrangement | None:
    """Prove that element i of `output` is an element of one of the inputs plus something, for every i, and say which.

    Equal shapes prove nothing: rows and columns may have been exchanged on the way. So the element numbers of the inputs
    are sent along the residual path through every re-arrangement, and with the stream through a merged skip (`merged_stream`).

    Args:
        flow: Of the whole graph.
        region: The region's nodes in order.
        inputs: What the region reads.
        entered: Those that enter the first block; others may be joined to these later, and are no source where they are added.
        output: A value of the region.

    Returns:
        None where that cannot be proved.
    """
    if not entered:
        return None
    tensors = [node for node in inputs if isinstance(node.meta.get("val"), Tensor) and node.meta["val"].is_floating_point()]
    numbered = _Numbered(flow, entered, [node for node in tensors if node not in entered])
    for node in region:
        numbered.visit(node)
    got = numbered.places.get(output)
    if not isinstance(got, Tensor) or bool((got < 0).any()) or not bool((got < numbered.limit).any()):
        return None
    copied: dict[Node, dict[Node, Node]] = {}
    inside = set(region)

    def rebuilt(node: Node) -> bool:
        if node in inputs or node in copied:
            return True
        operands = {operand: numbered.first.get(operand, operand) for operand in node.all_input_nodes}
        if operator_name(node) not in LAYOUT or any(o in inside and o not in numbered.first for o in operands.values()):
            return False
        if not all(rebuilt(operand) for operand in operands.values() if operand in inside):
            return False
        copied[node] = operands
        return True

    source = numbered.first[output]
    return Arrangement(source, copied) if rebuilt(source) else None
