"""Which stacks the stream to the output runs through, and which value of each block is that stream."""

from __future__ import annotations

from torch.fx import Graph, Node

from bwcache_compile.ir.dataflow import DataFlow
from bwcache_compile.ir.sizes import Size, is_unknown, shape_of, size_of
from bwcache_compile.passes.block_search.isomorphism import difference, outside_operands
from bwcache_compile.passes.block_search.stacks import Stack, Unit, extent, live_outs
from bwcache_compile.passes.block_search.streams import continued, input_stream, is_token_input, needed_rows


def _reached(starts: list[Node], avoid: set[Node]) -> set[Node]:
    """Return the token inputs that `starts` depend on along a path around `avoid`."""
    stack, seen = list(starts), set(avoid)
    found = set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_token_input(node):
            found.add(node)
        stack += node.all_input_nodes
    return found


def _carried_into(units: list[Unit], flow: DataFlow, streams: set[Node]) -> list[Node]:
    """Return the streams that enter the first unit and are carried from unit to unit."""
    first = units[0]
    mask = flow.mask(first.nodes)
    outer = [node for node in outside_operands(first) if node in streams]
    for other in units[1:]:
        if difference(first, other) is None:
            mine, theirs = outside_operands(first), outside_operands(other)
            carried = [a for a, b in zip(mine, theirs, strict=False) if a in streams and flow.ancestors[b] & mask]
            return carried or outer
    loose = [node for node in outer if not all(node in outside_operands(unit) for unit in units[1:])] or outer
    handed_on = {extent(node) for node in live_outs(first, streams)}
    return [node for node in loose if extent(node) in handed_on] or loose  # of another size: an input of this block alone


def main_units(stacks: list[Stack], flow: DataFlow, streams: set[Node]) -> list[Unit]:
    """Choose the units that the stream to the output runs through: refiners and encoders of other streams stay out.

    The last stack that the output depends on is in; so is one between units that are in; so is one that every stream
    entering them has passed through. What several units read is a condition, not a stream that enters. Where the latents
    can be told from other inputs, one that all latents entering the units have passed through is in too: text may join behind it.
    """
    output = flow.nodes[-1]
    latents = input_stream(output.graph, flow)
    used = [Stack(s.name, tuple(u for u in s.units if flow.ancestors[output] & flow.mask(u.nodes))) for s in stacks]
    rest = [s for s in used if s.units]
    if not rest:
        return []
    main: list[Unit] = []
    chosen: Stack | None = max(rest, key=lambda s: flow.index[s.units[-1].nodes[-1]])
    while chosen is not None:
        rest.remove(chosen)
        main = sorted([*main, *chosen.units], key=lambda u: flow.index[u.nodes[-1]])
        mask = flow.mask(node for unit in main for node in unit.nodes)
        between = flow.before(mask) & flow.after(mask)
        starts = _carried_into(main, flow, streams)
        read = [node for unit in main for node in outside_operands(unit)]
        conditions = {node for node in read if read.count(node) > 1}.difference(starts)
        inside = [s for s in rest if any(flow.mask(u.nodes) & between for u in s.units)]
        entering = _reached(starts, conditions)
        entering = entering & latents or entering
        before = [s for s in rest if starts and not entering & _reached(starts, conditions.union(n for u in s.units for n in u.nodes))]
        chosen = next(iter(inside or sorted(before, key=lambda s: -flow.index[s.units[-1].nodes[-1]])), None)
    return main


def features(units: list[Unit], graph: Graph, streams: set[Node]) -> tuple[list[Node], tuple[Size, Size] | None]:
    """Follow the stream that the output takes back from the last block to the first.

    Returns:
        One live-out per unit, and the rows (dimension 1) of the last one that the output takes, where that is proved.
    """
    needs = needed_rows(graph)
    outs = [node for node in live_outs(units[-1], streams) if node in needs]
    feature = max(outs or live_outs(units[-1], streams), key=extent)
    rows, length = needs.get(feature), feature.meta["val"].shape[1]
    found = [feature]
    for unit in reversed(units[:-1]):
        candidates = live_outs(unit, streams)
        near = continued(found[0], set(candidates)) or candidates
        shape = shape_of(found[0].meta["val"])
        found.insert(0, max(near, key=lambda node: (shape_of(node.meta["val"]) == shape, extent(node))))
    taken = None if rows is None or any(map(is_unknown, rows)) else (size_of(rows[0]), size_of(rows[1]))
    return found, None if taken == (0, size_of(length)) else taken
