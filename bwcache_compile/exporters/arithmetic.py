"""Sizes and conditions from a manifest, evaluated without running anything but integer arithmetic. Needs no torch."""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

from bwcache_compile.errors import BundleError

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip
_COMPARE: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
_UNARY: dict[type, Callable[[Any], Any]] = {ast.USub: operator.neg, ast.Not: operator.not_}
_CALLS: dict[str, Callable[..., Any]] = {"max": max, "min": min}
_LARGEST_POWER = 8
_MOST_BITS = 512


def _walk(node: ast.AST, symbols: Mapping[str, int]) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) in (int, bool):
        return node.value
    if isinstance(node, ast.Name):
        return symbols[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)](_walk(node.left, symbols), _walk(node.right, symbols))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        base, power = _walk(node.left, symbols), _walk(node.right, symbols)
        if 0 <= power <= _LARGEST_POWER and base.bit_length() * power <= _MOST_BITS:
            return base**power
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_walk(node.operand, symbols))
    if isinstance(node, ast.Compare) and all(type(op) in _COMPARE for op in node.ops):
        values = [_walk(n, symbols) for n in (node.left, *node.comparators)]
        return all(_COMPARE[type(op)](a, b) for op, a, b in zip(node.ops, values, values[1:], strict=False))
    if isinstance(node, ast.BoolOp):
        values = [_walk(n, symbols) for n in node.values]
        return all(values) if isinstance(node.op, ast.And) else any(values)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CALLS and node.args and not node.keywords:
        return _CALLS[node.func.id](*(_walk(n, symbols) for n in node.args))
    raise ValueError(f"{type(node).__name__} is no arithmetic on sizes")


@functools.cache
def _parsed(size: str) -> ast.expr:
    return ast.parse(size, mode="eval").body


def arithmetic(size: int | str, symbols: Mapping[str, int]) -> int:
    """Return a size, or the truth of a condition, where the symbols have these values.

    Raises:
        BundleError: It holds something else than integer arithmetic, comparisons, `max` and `min` over these symbols.
    """
    if isinstance(size, int):
        return size
    try:
        return _walk(_parsed(size), symbols)
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError, RecursionError, MemoryError, TypeError) as error:
        reason = f"unknown symbol {error}" if isinstance(error, KeyError) else str(error)
        raise BundleError(f"manifest.json: the size {size[:80]!r} cannot be evaluated: {reason}.") from error
