"""Which candidates are stacks of blocks, and why the others are not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from torch.fx import Graph, Node

from bwcache_compile.ir.dataflow import DataFlow
from bwcache_compile.ir.graph_text import format_value
from bwcache_compile.ir.plan import Rejection
from bwcache_compile.passes.block_search.isomorphism import difference, outside_operands
from bwcache_compile.passes.block_search.stacks import (
    Stack,
    Unit,
    attends,
    extent,
    live_outs,
    named_stacks,
    products,
    structural_stacks,
)


def _shown(nodes: Iterable[Node]) -> str:
    return ", ".join(f"`{node.name}` {format_value(node.meta.get('val'))}" for node in nodes)


def _no_block(unit: Unit, streams: set[Node]) -> str | None:
    if products(unit.nodes) < 2:
        own = _shown(node for node in unit.nodes if products([node]))
        return f"{unit.name} has fewer than two matrix products ({own or 'none'})"
    if not live_outs(unit, streams):
        return f"{unit.name} has no floating-point output of rank 3 or more ({_shown(live_outs(unit, set(unit.nodes))) or 'nothing'})"
    return None


def _rejected(stack: Stack, count: int, reason: str) -> Rejection:
    return Rejection(stack.name, count, reason, frozenset(node.name for unit in stack.units for node in unit.nodes))


def _extents(unit: Unit, streams: set[Node]) -> set[tuple[int, int]]:
    return {extent(node) for node in live_outs(unit, streams)}


def _of_one_size(units: list[Unit], streams: set[Node]) -> list[Unit]:
    """Return the units that hand on as many numbers as most others do, in whatever arrangement."""
    sizes = [size for unit in units for size in _extents(unit, streams)]
    common = max(dict.fromkeys(sizes), key=sizes.count)
    return [unit for unit in units if common in _extents(unit, streams)]


def _are_kin(unit: Unit, other: Unit) -> bool:
    return (unit.module_type != "" and unit.module_type == other.module_type) or difference(other, unit) is None


def _structurally_equal(units: list[Unit]) -> list[Unit]:
    """Return the units that have a sibling: of the same class, or running the same operators."""
    return [unit for unit in units if any(other is not unit and _are_kin(unit, other) for other in units)]


def convex_closure(unit: Unit, flow: DataFlow) -> Unit:
    """Take in what runs between a unit's own operators: a module that is reached into leaves its sums outside."""
    mask = flow.mask(unit.nodes)
    inside = flow.select(flow.before(mask) & flow.after(mask))
    return dataclasses.replace(unit, nodes=tuple(node for node in inside if node.op == "call_function"))


def follows(following: Unit, unit: Unit, flow: DataFlow) -> bool:
    """Whether a unit depends on another."""
    return bool(flow.before(flow.mask(following.nodes)) & flow.mask(unit.nodes))


def _chains(units: list[Unit], flow: DataFlow) -> list[list[Unit]]:
    """Part units where one does not depend on the one before it."""
    chains = [[units[0]]]
    for unit in units[1:]:
        if follows(unit, chains[-1][-1], flow):
            chains[-1].append(unit)
        else:
            chains.append([unit])
    return chains


def overlapping(units: list[Unit]) -> tuple[Unit, Unit, Node] | None:
    """Return the first two units that share an operator, and that operator."""
    owners: dict[Node, Unit] = {}
    for unit in units:
        for node in unit.nodes:
            if node in owners:
                return owners[node], unit, node
            owners[node] = unit
    return None


def _judge(stack: Stack, flow: DataFlow, streams: set[Node]) -> tuple[list[Stack], str | None]:
    """Return the chains of blocks that a candidate holds, and why what is left of it is none.

    A cached region is right whatever it holds; these rules keep out what only looks like a stack of blocks. Modules
    that fail them alone may run between the blocks.
    """
    reasons = {unit.name: _no_block(unit, streams) for unit in stack.units}
    units = [unit for unit in stack.units if reasons[unit.name] is None]
    reason = next((r for r in reasons.values() if r), None)
    if len(units) < 2:
        return [], reason
    alike = _of_one_size(units, streams)
    odd = next((unit for unit in units if unit not in alike), None)
    if odd is not None and reason is None:
        usual = f"{alike[0].name} ({_shown(live_outs(alike[0], streams))})"
        reason = f"{odd.name} has another output size ({_shown(live_outs(odd, streams))}) than {usual}"
    if len(_structurally_equal(alike)) < 2:  # a stack that holds blocks may hold others of their size: a last block often differs
        return [], reason or f"{alike[1].name} differs from {alike[0].name} {difference(alike[0], alike[1])}"
    alike = [convex_closure(unit, flow) for unit in alike]
    shared = overlapping(alike)
    if shared is not None:
        return [], f"`{shared[2].name}` of {shared[1].name} runs in the middle of {shared[0].name}"
    chains = _chains(alike, flow)
    accepted = [Stack(stack.name, tuple(chain)) for chain in chains if len(chain) > 1]
    if not accepted:
        reason = f"{alike[1].name} does not depend on {alike[0].name}"
    return accepted, reason


def _within(stack: Stack, accepted: list[Stack]) -> bool:
    return any(unit.name == stack.name or stack.name.startswith(f"{unit.name}.") for s in accepted for unit in s.units)


def _is_staged(stack: Stack, candidates: list[Stack]) -> bool:
    """Whether a stack's modules are stages: each little else than a stack of equal blocks of its own."""
    stacks = [s for s in candidates if len(s.units) > 1 and products(s.units[0].nodes) > 1]
    model: Unit | None = None
    for unit in stack.units:
        inner = next((s for s in stacks if s.name.startswith(f"{unit.name}.")), None)
        if inner is None or 10 * sum(products(u.nodes) for u in inner.units) < 9 * products(unit.nodes):
            return False
        model = model or inner.units[0]
        if any(difference(model, u) for u in inner.units):
            return False
    return True


def _alone(stack: Stack, accepted: list[Stack], streams: set[Node]) -> bool:
    """Whether a candidate of one module is a block: of a class that is repeated elsewhere, or numbered, with an attention."""
    unit = stack.units[0]
    if _no_block(unit, streams):
        return False
    kin = [other for s in accepted for other in s.units if other.module_type == unit.module_type]
    entering = {extent(node) for node in outside_operands(unit) if node in streams}
    if kin and unit.module_type:
        return bool(_extents(unit, streams) & _extents(kin[0], streams))
    return unit.name.rpartition(".")[2].isdigit() and attends(unit) and bool(entering & _extents(unit, streams))


def _named(graph: Graph, flow: DataFlow, streams: set[Node]) -> tuple[list[Stack], list[Rejection]]:
    accepted: list[Stack] = []
    rejections: list[Rejection] = []
    passed_over: list[Rejection] = []  # worth a word only where there is nothing better
    candidates = named_stacks(graph)
    for stack in candidates:
        if len(stack.units) == 1 or _within(stack, accepted):
            continue
        if _is_staged(stack, candidates):
            passed_over.append(_rejected(stack, len(stack.units), "its modules are stages; the stacks inside them are considered instead"))
            continue
        if not any(products(unit.nodes) > 1 for unit in stack.units):
            if any(products(unit.nodes) and (len(unit.nodes) > 1 or unit.name[-1:].isdigit()) for unit in stack.units):
                passed_over.append(_rejected(stack, len(stack.units), _no_block(stack.units[0], streams) or ""))
            continue
        chains, reason = _judge(stack, flow, streams)
        accepted += chains
        if reason is not None:
            taken = {unit.name for chain in chains for unit in chain.units}
            left = dataclasses.replace(stack, units=tuple(unit for unit in stack.units if unit.name not in taken))
            rejections.append(_rejected(left, len(left.units), reason))
    for stack in candidates:
        if len(stack.units) > 1 or _within(stack, accepted):
            continue
        single = Stack(stack.name, (convex_closure(stack.units[0], flow),))
        if _alone(stack, accepted, streams) and overlapping([unit for s in [*accepted, single] for unit in s.units]) is None:
            accepted.append(single)
        elif products(stack.units[0].nodes) > 1:
            alone = f"{stack.name} is a single module whose class is not repeated elsewhere"
            passed_over.append(_rejected(stack, 1, _no_block(stack.units[0], streams) or alone))
    if not accepted:
        outer = [r for r in passed_over if not any(r.nodes < other.nodes for other in [*rejections, *passed_over])]
        rejections += outer
    return accepted, rejections


def accepted_stacks(graph: Graph, flow: DataFlow, streams: set[Node]) -> tuple[list[Stack], list[Rejection]]:
    """Return the stacks of blocks of a graph, and every candidate that is none, with the reason.

    Modules are looked at first. Where they hold less than half of the matrix products, operators outside them that
    repeat three times count too; two repetitions are enough where all stacks hold half of the products together.
    """
    accepted, rejections = _named(graph, flow, streams)
    taken = {node for stack in accepted for unit in stack.units for node in unit.nodes}
    total = products(graph.nodes)
    if 2 * products(taken) >= total:
        return accepted, rejections
    seen = 0
    for least in (3, 2):
        found: list[Stack] = []
        stacks = structural_stacks(graph, least, taken, seen)
        for stack in stacks:
            chains, reason = _judge(stack, flow, streams)
            found += chains
            if reason is not None and not chains and not rejections and products(stack.units[0].nodes) > 1:
                rejections.append(_rejected(stack, len(stack.units), reason))
        held = {node for stack in found for unit in stack.units for node in unit.nodes}
        if least > 2 or 2 * products(taken | held) >= total:
            accepted += found
        seen, taken = seen + len(stacks), taken | held
    return accepted, rejections
