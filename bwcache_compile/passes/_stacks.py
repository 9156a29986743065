"""Candidate stacks: by module names where the graph has them, else by its repeating structure."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from bwcache_compile.graph_text import format_value, op_name

_PRODUCTS = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention")


@dataclasses.dataclass(frozen=True)
class Unit:
    """One repetition of a candidate stack: its operators in execution order."""

    name: str
    module_type: str
    nodes: tuple[Node, ...]


@dataclasses.dataclass(frozen=True)
class Stack:
    """A candidate stack."""

    name: str
    units: tuple[Unit, ...]


def is_stream(node: Node) -> bool:
    """Whether a value can be a hidden state: floating, with at least batch, token and channel dimensions."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 3


def is_substantial(unit: Unit) -> bool:
    """Whether a unit multiplies matrices at least twice, so that a lone projection is no block.

    A higher-order operator counts as enough: what it multiplies is in a graph of its own.
    """
    if any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in unit.nodes):
        return True
    return sum(op_name(node) in _PRODUCTS for node in unit.nodes) >= 2


def live_outs(unit: Unit) -> list[Node]:
    """Return the streams of a unit that somebody outside reads."""
    inside = set(unit.nodes)
    return [node for node in unit.nodes if is_stream(node) and any(user not in inside for user in node.users)]


def named_stacks(graph: Graph) -> list[Stack]:
    """Group operators by the numbered siblings (`blocks.0`, `blocks.1`, ...) whose forward they ran in, outermost first.

    Siblings that are not numbered count as a stack where they are of one class. A name alone proves nothing; a module
    that is reached into without being called does not appear.
    """
    found: dict[tuple[str, str], dict[str, tuple[str, list[Node]]]] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        for key, (path, kind) in (node.meta.get("nn_module_stack") or {}).items():
            parent, _, last = str(path).rpartition(".")
            if not last:
                continue
            type_name = kind if isinstance(kind, str) else kind.__name__
            stack = (parent, "" if last.isdigit() else type_name)
            call = f"{path}@{key.rpartition('@')[2]}" if "@" in key else str(path)
            found.setdefault(stack, {}).setdefault(call, (type_name.rpartition(".")[2], []))[1].append(node)
    stacks = []
    for (parent, kind), members in found.items():
        if len(members) > 1:
            units = tuple(Unit(name, type_name, tuple(nodes)) for name, (type_name, nodes) in members.items())
            stacks.append(Stack(parent or kind or "the model", units))
    return sorted(stacks, key=lambda s: (s.name.count(".") + 1 if s.name else 0, s.name))


def _token(node: Node) -> tuple[Any, ...]:
    """What an operator looks like from outside: its kind, its result and its operands, constants left out."""
    operands = tuple(format_value(a.meta.get("val")) for a in node.all_input_nodes)
    return (str(node.target), format_value(node.meta.get("val")), operands)


def _longest_period(tokens: list[int], least: int) -> tuple[int, int, int] | None:
    """Find (start, period, repetitions) that cover the most operators with at least `least` repetitions."""
    sequence = torch.tensor(tokens)
    best: tuple[int, int, int] | None = None
    for period in range(2, len(tokens) // least + 1):
        equal = sequence[period:] == sequence[:-period]
        breaks = torch.cat([torch.tensor([-1]), (~equal).nonzero().flatten(), torch.tensor([len(equal)])])
        runs = breaks.diff() - 1
        longest = int(runs.argmax())
        repetitions = (int(runs[longest]) + period) // period
        if repetitions >= least and (best is None or repetitions * period > best[1] * best[2]):
            best = (int(breaks[longest]) + 1, period, repetitions)
    return best


def _cut_cost(nodes: list[Node], at: int) -> int:
    """Count the values that cross a cut of the sequence; a block begins where it is least."""
    left = set(nodes[:at])
    return sum(1 for node in left if any(user in set(nodes[at:]) for user in node.users))


def structural_stacks(graph: Graph, least: int = 3) -> list[Stack]:
    """Find runs of operators that repeat at least `least` times, longest cover first, without looking at names."""
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    kinds: dict[tuple[Any, ...], int] = {}
    stacks: list[Stack] = []
    pieces = [nodes]
    while pieces:
        piece = pieces.pop()
        tokens = [kinds.setdefault(_token(node), len(kinds)) for node in piece]
        found = _longest_period(tokens, least)
        if found is None:
            continue
        start, period, repetitions = found
        slack = 0
        while (
            start + period * repetitions + slack < len(tokens) and tokens[start + slack] == tokens[start + slack + period * (repetitions)]
        ):
            slack += 1
        start = min(range(start, start + min(slack, period - 1) + 1), key=lambda at: _cut_cost(piece, at))
        units = tuple(
            Unit(f"repeat{len(stacks)}.{i}", "repeated operators", tuple(piece[start + i * period : start + (i + 1) * period]))
            for i in range(repetitions)
        )
        stacks.append(Stack(f"repeat{len(stacks)}", units))
        pieces += [piece[:start], piece[start + period * repetitions :]]
    return stacks
