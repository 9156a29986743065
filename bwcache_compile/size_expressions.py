"""Evaluate sizes and conditions: Python arithmetic over the symbols of a program, without `eval` and without torch.

A size is an int, or a string such as `s33*(s20 // 2)` or `trunc(float(s7) ** 0.5)`. A string survives JSON, may come from
a file that nobody trusts, and evaluates alike over ints and over torch's symbolic ints, which then record the arithmetic.
"""

from __future__ import annotations

import ast
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_Evaluator = Callable[[Mapping[str, Any]], Any]

_LARGEST_POWER = 8
_MOST_BITS = 512
_PARSED = 4096
"""Strings that are kept parsed."""


class SizeError(ValueError):
    """A string is no arithmetic on sizes, or has no value for these sizes."""


def _plain(values: Sequence[Any]) -> bool:
    return all(isinstance(value, (int, float)) for value in values)


def largest(*values: Any) -> Any:
    """Return the largest of some sizes: ints or symbolic ints."""
    if _plain(values):
        return max(values)
    import torch

    return functools.reduce(torch.sym_max, values)


def smallest(*values: Any) -> Any:
    """Return the smallest of some sizes: ints or symbolic ints."""
    if _plain(values):
        return min(values)
    import torch

    return functools.reduce(torch.sym_min, values)


def _float(value: Any) -> Any:
    if _plain([value]):
        return float(value)
    import torch

    symbolic: Any = torch
    return symbolic.sym_float(value)


def _sqrt(value: Any) -> Any:
    if _plain([value]):
        return math.sqrt(value)
    import torch

    symbolic: Any = torch
    return symbolic._sym_sqrt(value)


def _power(base: Any, power: Any) -> Any:
    if isinstance(base, int) and isinstance(power, int) and not (0 <= power <= _LARGEST_POWER and base.bit_length() * power <= _MOST_BITS):
        raise SizeError(f"{base}**{power} is out of range")
    value = base**power
    if isinstance(value, complex):
        raise SizeError(f"{base}**{power} is not a real number")
    return value


_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv, ast.Div: operator.truediv,
    ast.Mod: operator.mod, ast.Pow: _power,
}  # fmt: skip
_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
_UNARY: dict[type, Callable[[Any], Any]] = {ast.USub: operator.neg, ast.Not: operator.not_}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "max": largest, "min": smallest, "float": _float, "sqrt": _sqrt, "abs": abs, "round": round,
    "trunc": math.trunc, "floor": math.floor, "ceil": math.ceil,
}  # fmt: skip


def _compare(operators: list[Callable[[Any, Any], Any]], operands: list[_Evaluator], symbols: Mapping[str, Any]) -> bool:
    values = [operand(symbols) for operand in operands]
    return all(compare(a, b) for compare, a, b in zip(operators, values, values[1:], strict=False))


def _evaluator(node: ast.AST) -> _Evaluator:
    """Return a function of the symbols' values that computes an expression."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
        return lambda _, value=node.value: value  # type: ignore[misc]
    if isinstance(node, ast.Name):
        return operator.itemgetter(node.id)
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        binary, left, right = _BINARY[type(node.op)], _evaluator(node.left), _evaluator(node.right)
        return lambda symbols: binary(left(symbols), right(symbols))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        unary, operand = _UNARY[type(node.op)], _evaluator(node.operand)
        return lambda symbols: unary(operand(symbols))
    if isinstance(node, ast.Compare) and all(type(op) in _COMPARE for op in node.ops):
        return functools.partial(_compare, [_COMPARE[type(op)] for op in node.ops], list(map(_evaluator, (node.left, *node.comparators))))
    if isinstance(node, ast.BoolOp):
        joined, parts = all if isinstance(node.op, ast.And) else any, list(map(_evaluator, node.values))
        return lambda symbols: joined(part(symbols) for part in parts)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and node.args and not node.keywords:
        function, operands = _FUNCTIONS[node.func.id], list(map(_evaluator, node.args))
        return lambda symbols: function(*(operand(symbols) for operand in operands))
    raise SizeError(f"{type(node).__name__} is not supported in a size expression")


@functools.lru_cache(_PARSED)
def _parsed(size: str) -> tuple[_Evaluator, tuple[str, ...]]:
    tree = ast.parse(size, mode="eval").body
    evaluator = _evaluator(tree)
    functions = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in functions]
    return evaluator, tuple(dict.fromkeys(names))


def evaluate(size: int | str, symbols: Mapping[str, Any]) -> Any:
    """Return a size, or the truth of a condition, where the symbols have these values: ints or symbolic ints.

    Raises:
        SizeError: It is no arithmetic over these symbols, or has no value for theirs.
    """
    if isinstance(size, int):
        return size
    try:
        return _parsed(size)[0](symbols)
    except (SyntaxError, ValueError, KeyError, ArithmeticError, RecursionError, MemoryError, TypeError) as error:
        reason = f"unknown symbol {error}" if isinstance(error, KeyError) else str(error)
        raise SizeError(f"the size {size[:80]!r} cannot be evaluated: {reason}.") from error


def evaluated(shape: Sequence[int | str], symbols: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return a shape where the symbols have these values."""
    return tuple(evaluate(size, symbols) for size in shape)


def names_in(size: str) -> tuple[str, ...]:
    """Return the names of the symbols that a size mentions."""
    return _parsed(size)[1]
