"""Candidate stacks: by module names where the graph has them, else by its repeating structure."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from bwcache_compile.ir.graph_text import format_value, op_name
from bwcache_compile.ir.torch_compat import HigherOrderOperator

_PRODUCTS = {
    **dict.fromkeys(("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention"), 1),
    **dict.fromkeys(("_int_mm", "_scaled_mm"), 1),  # of quantized activations
    "_native_multi_head_attention": 3,  # torch's fused modules hold the products of a whole attention, or of a layer
    "_transformer_encoder_layer_fwd": 5,
}

_LOOKED_UP = re.compile(r"__dict__\['_modules'\]\['(\w+)'\]")
"""A module that was reached through the dictionary of another, as Dynamo writes it for a generator expression over modules."""

REPEATED = "repeated operators"
"""The module type of units that are no modules."""


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


def extent(node: Node) -> tuple[int, int]:
    """Return how many numbers a tensor holds, and how many channels: what re-arranging its tokens does not change.

    Sizes are those at capture; one that only the tensors' values tell counts as 1.
    """
    sizes = [size if isinstance(size, int) else size.node.hint or 1 for size in node.meta["val"].shape]
    return math.prod(sizes), sizes[-1]


def streams(graph: Graph, rank: int) -> set[Node]:
    """Return the values that can be hidden states: floating, with tokens and channels and, for rank 3, a batch dimension."""
    found = set()
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= rank:
            found.add(node)
    return found


def products(nodes: Iterable[Node]) -> int:
    """Count the matrix products among operators. A higher-order operator counts as two: it has a graph of its own."""
    return sum(2 if isinstance(n.target, HigherOrderOperator) else _PRODUCTS.get(op_name(n), 0) for n in nodes)


def attends(unit: Unit) -> bool:
    """Whether a unit holds an attention, by its operator or by two products of activations."""
    names = [op_name(node) for node in unit.nodes]
    return (
        any("attention" in name or _PRODUCTS.get(name, 0) > 1 for name in names)
        or sum(name in ("matmul", "bmm", "einsum") for name in names) >= 2
    )


def live_outs(unit: Unit, streams: set[Node]) -> list[Node]:
    """Return the streams of a unit that somebody outside reads."""
    inside = set(unit.nodes)
    return [node for node in unit.nodes if node in streams and any(user not in inside for user in node.users)]


def user_path(path: object) -> str:
    """Return a module's path as its user writes it.

    That is without the wrappers of `torch.compile`, and without how a strict capture looked it up.
    """
    written = _LOOKED_UP.sub(r"\1", str(path))
    return ".".join(part for part in written.split(".") if part != "_orig_mod")


def _class_name(kind: Any) -> str:
    return str(kind if isinstance(kind, str) else kind.__qualname__)


def called_members(unit: Unit) -> dict[str, str]:
    """Return the members of a list of modules that are called in a unit, in order: path to class.

    Empty where the unit is no list: a list is never called, and its members are numbered.
    """
    found: dict[str, str] = {}
    if unit.module_type:
        return found
    for node in unit.nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            name = user_path(path)
            if name.startswith(f"{unit.name}.") and name.removeprefix(f"{unit.name}.").split(".")[0].isdigit():
                found.setdefault(name, _class_name(kind).rpartition(".")[2])
                break
    return found


def block_name(unit: Unit) -> str:
    """Return the name of a unit as a block: its path, or those of the members of a list, joined."""
    return "+".join(called_members(unit)) or unit.name


def _modules_of(node: Node, called: set[str]) -> Iterator[tuple[str, str, str]]:
    """List the modules that an operator ran in: path, class, and which call of the module it was.

    A numbered module that is reached into without being called (`blocks[0].attn(x)`) counts too, without a class. A module
    that is compiled, `torch.compile(block)`, is listed once, under the path that it was assigned to.
    """
    stack = node.meta.get("nn_module_stack") or {}
    written = {key: user_path(path) for key, (path, _) in stack.items()}
    for key, (_, kind) in stack.items():
        path = written[key]
        if path in list(written.values())[list(written).index(key) + 1 :]:
            continue
        parts = path.split(".")
        for i, part in enumerate(parts[:-1], 1):
            prefix = ".".join(parts[:i])
            if part.isdigit() and prefix not in called:
                yield prefix, "", prefix
        yield path, _class_name(kind), f"{path}@{key.rpartition('@')[2]}" if "@" in key else path


def named_stacks(graph: Graph) -> list[Stack]:
    """Group operators by the numbered siblings (`blocks.0`, `blocks.1`, ...) whose forward they ran in, outermost first.

    Siblings that are not numbered count as a stack where they are of one class. A name alone proves nothing.
    """
    operators = [node for node in graph.nodes if node.op == "call_function"]
    called = {user_path(path) for node in operators for path, _ in (node.meta.get("nn_module_stack") or {}).values()}
    found: dict[tuple[str, str], dict[str, tuple[str, dict[Node, None]]]] = {}
    for node in operators:
        for path, type_name, call in _modules_of(node, called):
            parent, _, last = path.rpartition(".")
            if last:
                stack = (parent, "" if last.isdigit() else type_name)
                found.setdefault(stack, {}).setdefault(call, (type_name.rpartition(".")[2], {}))[1][node] = None
    stacks = []
    for (parent, kind), members in found.items():
        units = tuple(Unit(name, type_name, tuple(nodes)) for name, (type_name, nodes) in members.items())
        alone = len(units) == 1 and kind  # a lone module without a number is named as it is
        stacks.append(Stack(units[0].name if alone else parent or kind or "the model", units))
    return sorted(stacks, key=lambda s: (s.units[0].name.count("."), s.name))


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


def _handed_on(nodes: list[Node], at: int, period: int) -> int:
    """Count the values that a repetition beginning there hands on; a block begins where they are fewest."""
    inside = set(nodes[at : at + period])
    return sum(1 for node in inside if any(user not in inside for user in node.users))


def _runs(graph: Graph, taken: set[Node]) -> list[list[Node]]:
    """Return the operators between those that are taken, in pieces."""
    pieces: list[list[Node]] = [[]]
    for node in graph.nodes:
        if node.op == "call_function":
            if node in taken:
                pieces.append([])
            else:
                pieces[-1].append(node)
    return [piece for piece in pieces if piece]


def structural_stacks(graph: Graph, least: int, taken: set[Node], first: int = 0) -> list[Stack]:
    """Find runs of operators that repeat at least `least` times, longest cover first, without looking at names.

    Operators that are `taken` belong to other stacks already. Stacks are numbered from `first` on.
    """
    kinds: dict[tuple[Any, ...], int] = {}
    stacks: list[Stack] = []
    pieces = _runs(graph, taken)
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
        start = min(range(start, start + min(slack, period - 1) + 1), key=lambda at: _handed_on(piece, at, period))
        units = tuple(
            Unit(f"repeat{first + len(stacks)}.{i}", REPEATED, tuple(piece[start + i * period : start + (i + 1) * period]))
            for i in range(repetitions)
        )
        stacks.append(Stack(f"repeat{first + len(stacks)}", units))
        pieces += [piece[:start], piece[start + period * repetitions :]]
    return stacks
