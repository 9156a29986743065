"""Find the repeated blocks of the main stacks. An analysis: the graph is not edited."""

from __future__ import annotations

import torch
from torch.fx import Node

from bwcache_compile.dataflow import DataFlow
from bwcache_compile.passes._isomorphism import difference, outside_operands
from bwcache_compile.passes._stacks import Stack, Unit, is_stream, is_substantial, live_outs, named_stacks, structural_stacks
from bwcache_compile.passes._streams import continued, needed_rows
from bwcache_compile.program import Block, BlockSearch, CachedProgram, Rejection
from bwcache_compile.sizes import Size, hint_shape, shape_of, size_of


def _classes(stack: Stack) -> list[list[Unit]]:
    """Group the units of a stack by what they do, in order of first appearance."""
    classes: list[list[Unit]] = []
    for unit in stack.units:
        for members in classes:
            if difference(members[0], unit) is None:
                members.append(unit)
                break
        else:
            classes.append([unit])
    return classes


def _objection(stack: Stack, flow: DataFlow) -> str | None:
    """Say why a candidate stack is no stack of blocks; None accepts it."""
    for unit in stack.units:
        if not is_substantial(unit):
            return f"{unit.name} multiplies fewer than two matrices"
        if not live_outs(unit):
            return f"{unit.name} returns no floating value of rank 3 or more"
    for unit, following in zip(stack.units, stack.units[1:], strict=False):
        if not flow.before(flow.mask(following.nodes)) & flow.mask(unit.nodes):
            return f"{following.name} does not depend on {unit.name}"
    ends = (stack.units[0], stack.units[-1])
    classes = _classes(stack)
    common = max(classes, key=len)[0]
    for members in classes:
        odd = members[0]
        # the first and last block may have an input less or an output less than the others
        if len(members) == 1 and not (odd in ends and odd.module_type == common.module_type):
            return f"{odd.name} differs from {common.name} {difference(common, odd)}"
    shapes = {shape_of(node.meta["val"]) for node in live_outs(common)}
    for unit in stack.units:
        if not shapes & {shape_of(node.meta["val"]) for node in live_outs(unit)}:
            return f"{unit.name} returns another shape than {common.name}"
    for unit in stack.units:
        mask = flow.mask(unit.nodes)
        between = [n for n in flow.select(flow.before(mask) & flow.after(mask) & ~mask) if n.op == "call_function"]
        if between:
            return f"`{between[0].name}` outside {unit.name} runs in the middle of it"
    return None


def _accepted(program: CachedProgram, flow: DataFlow) -> tuple[list[Stack], list[Rejection]]:
    graph = program.compute.graph
    accepted: list[Stack] = []
    rejections: list[Rejection] = []
    for stack in named_stacks(graph):
        inside = any(unit.name == stack.name or stack.name.startswith(unit.name + ".") for s in accepted for unit in s.units)
        if inside or not any(is_substantial(unit) for unit in stack.units):
            continue
        objection = _objection(stack, flow)
        if objection is None:
            accepted.append(stack)
        else:
            rejections.append(Rejection(stack.name, len(stack.units), objection))
    if not accepted:
        for stack in structural_stacks(graph):
            objection = _objection(stack, flow)
            if objection is None:
                accepted.append(stack)
            elif any(is_substantial(unit) for unit in stack.units):
                rejections.append(Rejection(stack.name, len(stack.units), objection))
    return accepted, rejections


def _reaches(starts: list[Node], avoid: set[Node]) -> bool:
    """Whether a stream among the model's inputs reaches any of `starts` on a path around `avoid`."""
    stack, seen = list(starts), set(avoid)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder" and is_stream(node):
            return True
        stack += node.all_input_nodes
    return False


def _carried_into(units: list[Unit], flow: DataFlow) -> list[Node]:
    """Return the streams that enter the first unit and are carried from unit to unit."""
    first = units[0]
    outer = [node for node in outside_operands(first) if is_stream(node)]
    for other in units[1:]:
        if difference(first, other) is None:
            mine, theirs = outside_operands(first), outside_operands(other)
            mask = flow.mask(first.nodes)
            carried = [a for a, b in zip(mine, theirs, strict=False) if is_stream(a) and flow.ancestors[b] & mask]
            return carried or outer
    return outer


def _main_units(stacks: list[Stack], flow: DataFlow) -> list[Unit]:
    """Choose the units that the stream to the output runs through: refiners and encoders of other streams stay out.

    The last stack that the output depends on is in; so is one between units that are in; so is one that every stream
    entering them has passed through.
    """
    output = flow.nodes[-1]
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
        starts = _carried_into(main, flow)
        inside = [s for s in rest if any(flow.mask(u.nodes) & between for u in s.units)]
        before = [s for s in rest if starts and not _reaches(starts, {n for u in s.units for n in u.nodes})]
        chosen = next(iter(inside or sorted(before, key=lambda s: -flow.index[s.units[-1].nodes[-1]])), None)
    return main


def _features(units: list[Unit], program: CachedProgram) -> tuple[list[Node], tuple[Size, Size] | None]:
    """Follow the stream that the output takes back from the last block to the first."""
    needs = needed_rows(program.compute.graph)
    outs = [node for node in live_outs(units[-1]) if node in needs]

    def size(node: Node) -> int:
        return torch.Size(hint_shape(node.meta["val"])).numel()

    feature = max(outs or live_outs(units[-1]), key=size)
    rows, length = needs.get(feature), feature.meta["val"].shape[1]
    features = [feature]
    for unit in reversed(units[:-1]):
        candidates = live_outs(unit)
        near = continued(features[0], set(candidates)) or candidates
        shape = shape_of(features[0].meta["val"])
        features.insert(0, max(near, key=lambda node: (shape_of(node.meta["val"]) == shape, size(node))))
    if rows is None:
        return features, None
    taken = (size_of(rows[0]), size_of(rows[1]))
    return features, None if taken == (0, size_of(length)) else taken


def find_blocks(program: CachedProgram) -> BlockSearch:
    """List the blocks of the main stacks in execution order, with the feature of each, and the rejected candidates.

    Module names propose and align candidates; the graph's structure decides: every unit must multiply matrices at least twice, hand
    on a stream, depend on the unit before it, and match a sibling up to constants and weights (only the first and the
    last may differ). Without usable names, runs of operators that repeat at least three times are taken.

    Returns:
        The search; without blocks if nothing was accepted.
    """
    flow = DataFlow(program.compute.graph)
    stacks, rejections = _accepted(program, flow)
    units = _main_units(stacks, flow)
    if not units:
        return BlockSearch((), tuple(rejections))
    owner = {unit.name: stack.name for stack in stacks for unit in stack.units}
    chosen = {unit.name for unit in units}
    for stack in stacks:
        if not any(unit.name in chosen for unit in stack.units):
            rejections.append(Rejection(stack.name, len(stack.units), "its stream is not the one that reaches the output"))
    features, rows = _features(units, program)
    blocks = tuple(
        Block(
            name=unit.name,
            stack=owner[unit.name],
            module_type=unit.module_type,
            nodes=tuple(node.name for node in unit.nodes),
            live_outs=tuple(node.name for node in live_outs(unit)),
            feature=feature.name,
        )
        for unit, feature in zip(units, features, strict=True)
    )
    return BlockSearch(blocks, tuple(rejections), rows)
