"""Find the repeated blocks of the main stacks. An analysis: the graph is not edited."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from torch.fx import Graph, Node

from bwcache_compile.errors import ConfigError
from bwcache_compile.ir.dataflow import DataFlow
from bwcache_compile.ir.plan import Block, BlockSearch, Rejection
from bwcache_compile.ir.program import ModelProgram
from bwcache_compile.passes.block_search.accept import accepted_stacks, convex_closure, follows, overlapping
from bwcache_compile.passes.block_search.main_stacks import features, main_units
from bwcache_compile.passes.block_search.stacks import (
    REPEATED,
    Stack,
    Unit,
    block_name,
    called_members,
    live_outs,
    named_stacks,
    products,
    streams,
    structural_stacks,
)


def _search(units: list[Unit], owner: dict[str, str], rejections: list[Rejection], graph: Graph, found: set[Node]) -> BlockSearch:
    each, rows = features(units, graph, found)
    blocks = tuple(
        Block(
            name=block_name(unit),
            stack=owner[unit.name],
            module_type="+".join(called_members(unit).values()) or unit.module_type,
            nodes=tuple(node.name for node in unit.nodes),
            live_outs=tuple(node.name for node in live_outs(unit, found)),
            feature=feature.name,
        )
        for unit, feature in zip(units, each, strict=True)
    )
    return BlockSearch(blocks, tuple(rejections), rows)


def _candidates(graph: Graph) -> list[Stack]:
    """Return everything that a user can name: modules, stacks of modules, operators that repeat."""
    named = named_stacks(graph)
    return [*named, *structural_stacks(graph, 2, set())]


def _chosen(name: str, candidates: list[Stack], program: ModelProgram) -> list[Unit]:
    """Return the units that a name stands for: a module, else a stack of modules, else the stacks below a module."""
    exact = [unit for stack in candidates for unit in stack.units if name in (unit.name, block_name(unit))]
    stacks = [stack for stack in candidates if stack.name == name]
    below = [stack for stack in candidates if stack.name.startswith(f"{name}.")]
    nearest = [stack for stack in below if stack.name.count(".") == min(s.name.count(".") for s in below)]
    if exact:
        return exact[:1]
    for group in (stacks, nearest):
        units = [unit for stack in group for unit in stack.units]
        if units:
            return units
    known = "\n".join(
        f"    {stack.name} ({len(stack.units)} {'modules' if stack.units[0].module_type != REPEATED else f'x {REPEATED}'})"
        for stack in candidates
        if len(stack.units) > 1 and products(stack.units[0].nodes) > 1
    )
    raise ConfigError(f"blocks: {name!r} matches no module of {program.model_name}. Candidates:\n{known}")


def _as_told(program: ModelProgram, names: Sequence[str]) -> BlockSearch:
    """Take the blocks that the user names, if a region can be made of them."""
    graph, flow = program.compute.graph, DataFlow(program.compute.graph)
    candidates = _candidates(graph)
    owner: dict[str, str] = {}
    units: list[Unit] = []
    for name in names:
        for unit in _chosen(name, candidates, program):
            if unit.name not in owner:
                owner[unit.name] = name
                units.append(convex_closure(unit, flow))
    units.sort(key=lambda unit: flow.index[unit.nodes[-1]])
    found = streams(graph, 3)
    if not all(live_outs(unit, found) for unit in units):
        found = streams(graph, 2)
    shared = overlapping(units)
    if shared is not None:
        raise ConfigError(
            f"blocks={list(names)}: {shared[0].name} and {shared[1].name} of {program.model_name} share the operator `{shared[2].name}`."
            " Blocks must not overlap; name either the outer or the inner modules."
        )
    for unit in units:
        if not live_outs(unit, found):
            raise ConfigError(
                f"blocks={list(names)}: {unit.name} of {program.model_name} has no floating-point output of rank 2 or more that"
                " is read later. Name modules that pass on the hidden state."
            )
    for unit, following in itertools.pairwise(units):
        if not follows(following, unit, flow):
            raise ConfigError(
                f"blocks={list(names)}: {following.name} of {program.model_name} does not depend on {unit.name}, which runs before it."
                " Name consecutive blocks of one stream."
            )
    return dataclasses.replace(_search(units, owner, [], graph, found), chosen=True)


def find_blocks(program: ModelProgram, names: Sequence[str] = ()) -> BlockSearch:
    """List the blocks of the main stacks in execution order, with the feature of each, and the rejected candidates.

    Module names propose candidates; the graph decides: every block must multiply matrices at least twice, hand on a
    stream of the same size as its siblings, and depend on the block before it; it must be of its siblings' class, or
    run the same operators up to constants and weights. Where modules do not cover the model, runs of operators that
    repeat are taken.

    Args:
        program: After `canonicalize`.
        names: Blocks that the user chose, by module path or by the path of a stack; the graph decides only whether they
            follow one another.

    Returns:
        The search; without blocks if nothing was accepted.

    Raises:
        ConfigError: A name stands for nothing, or what is named cannot be a chain of blocks.
    """
    if names:
        return _as_told(program, names)
    graph, flow = program.compute.graph, DataFlow(program.compute.graph)
    first: tuple[Rejection, ...] | None = None
    for rank in (3, 2):  # without a batch dimension, tokens and channels alone are a hidden state
        found = streams(graph, rank)
        stacks, rejections = accepted_stacks(graph, flow, found)
        units = main_units(stacks, flow, found)
        if units:
            break
        first = tuple(rejections) if first is None else first
    else:
        return BlockSearch((), first or ())
    chosen = {unit.name for unit in units}
    for stack in stacks:
        if not any(unit.name in chosen for unit in stack.units):
            own = frozenset(node.name for unit in stack.units for node in unit.nodes)
            rejections.append(Rejection(stack.name, len(stack.units), "its stream is not the one that reaches the output", own))
    return _search(units, {unit.name: stack.name for stack in stacks for unit in stack.units}, rejections, graph, found)
