"""Dynamic sizes: print them as arithmetic, read each symbol from an input, and check that a program serves a call's sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

import sympy
from torch import SymInt, Tensor

from bwcache_compile.errors import CaptureError, first_line
from bwcache_compile.ir.torch_compat import PythonPrinter, statically_known_true
from bwcache_compile.size_expressions import SizeError, evaluate, evaluated, names_in

Size = int | str
Shape = tuple[Size, ...]

CallSizes = tuple[tuple[int, ...] | int | None, ...]
"""Of each leaf of a call: a tensor's shape, an int's value, None for all else."""


class _SizePrinter(PythonPrinter):
    """Prints what `size_expressions` evaluates, and refuses everything else."""

    def _call(self, name: str, expression: sympy.Expr) -> str:
        return f"{name}({', '.join(map(self._print, expression.args))})"

    def _print_Float(self, expression: sympy.Expr) -> str:
        return repr(float(expression))

    def _print_ToFloat(self, expression: sympy.Expr) -> str:
        return self._call("float", expression)

    def _print_OpaqueUnaryFn_sqrt(self, expression: sympy.Expr) -> str:
        return self._call("sqrt", expression)

    def _print_TruncToInt(self, expression: sympy.Expr) -> str:
        return self._call("trunc", expression)

    def _print_TruncToFloat(self, expression: sympy.Expr) -> str:
        return f"float({self._call('trunc', expression)})"

    def _print_FloorToInt(self, expression: sympy.Expr) -> str:
        return self._call("floor", expression)

    def _print_CeilToInt(self, expression: sympy.Expr) -> str:
        return self._call("ceil", expression)

    def _print_RoundToInt(self, expression: sympy.Expr) -> str:
        return self._call("round", expression)


def print_expression(expression: Any) -> str:
    """Print a sympy expression of symbolic sizes in the language that `size_expressions` evaluates.

    Raises:
        CaptureError: It holds a function that the language lacks.
    """
    printed = ""
    try:
        printed = _SizePrinter().doprint(expression)
        names_in(printed)
    except (NotImplementedError, AssertionError, SyntaxError, SizeError) as error:
        raise CaptureError(f"the size {printed or expression!s} cannot be dynamic: {first_line(error)}.") from error
    return printed


def size_of(value: int | SymInt) -> Size:
    """Describe an int as itself and a symbolic int as arithmetic."""
    if isinstance(value, SymInt):
        expression = value.node.expr
        return int(expression) if expression.is_number else print_expression(expression)
    return value


def shape_of(tensor: Tensor) -> Shape:
    """Describe a shape; two values have equal shapes at every size if these are equal."""
    return tuple(size_of(size) for size in tensor.shape)


def hint(value: int | SymInt) -> int:
    """Return the value that a symbolic int had when the model was captured."""
    return int(value.node.hint) if isinstance(value, SymInt) else value


def is_unknown(size: int | SymInt) -> bool:
    """Whether a size depends on the values of a tensor, and is not known before the model runs."""
    return isinstance(size, SymInt) and size.node.hint is None


def has_no_size(tensor: Tensor) -> bool:
    """Whether a size of a tensor depends on the values of one, and is not known before the model runs."""
    return any(map(is_unknown, tensor.shape))


def hint_shape(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape that a value had when the model was captured."""
    return tuple(hint(size) for size in tensor.shape)


def at_most(low: int | SymInt, high: int | SymInt) -> bool:
    """Whether `low <= high` is proved for every size that the program admits."""
    return bool(statically_known_true(low <= high))


@dataclasses.dataclass(frozen=True)
class VaryingSizes:
    """Asks a capture to make every size dynamic that the model allows.

    Attributes:
        seen: Sizes of other calls, which the program should serve too.
    """

    seen: tuple[CallSizes, ...] = ()


@dataclasses.dataclass(frozen=True)
class Symbol:
    """A dynamic size: each call decides its value.

    Attributes:
        name: As it stands in size strings.
        position: Which leaf of the call it is read from.
        dimension: Which dimension of that tensor; None where the leaf is an int.
        example: Its value when the model was captured.
        factor: What is read there is `factor * symbol + offset`.
        offset: See `factor`.
    """

    name: str
    position: int
    dimension: int | None
    example: int
    factor: int = 1
    offset: int = 0

    @property
    def is_read(self) -> bool:
        """Whether the symbol is read as it is, without arithmetic."""
        return (self.factor, self.offset) == (1, 0)

    def solve(self, read: Any) -> Any:
        """Return the symbol's value from what is read at its place."""
        return read if self.is_read else (read - self.offset) // self.factor


@dataclasses.dataclass(frozen=True)
class DynamicSizes:
    """Which sizes a captured graph was proved for.

    Attributes:
        symbols: Every size that may change.
        inputs: Of each leaf of the call: a tensor's shape, an int's value, None for all else.
        conditions: Python conditions over the symbols under which the graph is the model.
    """

    symbols: tuple[Symbol, ...]
    inputs: tuple[Shape | Size | None, ...]
    conditions: tuple[str, ...]

    def bind(self, sizes: CallSizes) -> dict[str, int] | None:
        """Return the symbols' values at a call, or None if the graph was not proved for its sizes."""
        if len(sizes) != len(self.inputs):
            return None
        values: dict[str, int] = {}
        for symbol in self.symbols:
            found = sizes[symbol.position]
            if isinstance(found, tuple) and symbol.dimension is not None and symbol.dimension < len(found):
                values[symbol.name] = symbol.solve(found[symbol.dimension])
            elif isinstance(found, int) and symbol.dimension is None:
                values[symbol.name] = symbol.solve(found)
            else:
                return None
        try:
            return values if self._hold(sizes, values) else None
        except SizeError:  # a condition divides by what is 0 here
            return None

    def _hold(self, sizes: CallSizes, values: dict[str, int]) -> bool:
        for expected, found in zip(self.inputs, sizes, strict=True):
            if isinstance(expected, tuple):
                if not isinstance(found, tuple) or evaluated(expected, values) != found:
                    return False
            elif expected is not None and evaluate(expected, values) != found:
                return False
        return all(evaluate(condition, values) for condition in self.conditions)


def _read_at(expression: sympy.Expr, symbol: sympy.Symbol) -> tuple[int, int] | None:
    """Return factor and offset where an expression is `factor * symbol + offset`."""
    if expression.free_symbols != {symbol}:
        return None
    factor, offset = expression.coeff(symbol, 1), expression.coeff(symbol, 0)
    linear = factor.is_Integer and offset.is_Integer and factor > 0 and expression == factor * symbol + offset
    return (int(factor), int(offset)) if linear else None


def open_sizes(inputs: list[Any], ranges: dict[Any, Any]) -> DynamicSizes | None:
    """Return the dynamic sizes of an exported graph's inputs, and the conditions that torch.export assumed of them.

    Returns:
        The sizes; None if every size turned out fixed.

    Raises:
        CaptureError: A symbol cannot be read off any input.
    """
    places: list[tuple[int, int | None, Any]] = []
    for at, value in enumerate(inputs):
        found = enumerate(value.shape) if isinstance(value, Tensor) else [(None, value)]
        places += [(at, i, size) for i, size in found if isinstance(size, SymInt) and size.node.expr.free_symbols]
    if not places:
        return None
    symbols: dict[sympy.Symbol, Symbol] = {}
    for wanted in sorted({s for _, _, size in places for s in size.node.expr.free_symbols}, key=str):
        readings = [(at, i, size, _read_at(size.node.expr, wanted)) for at, i, size in places]
        solvable = sorted((r for r in readings if r[3] is not None), key=lambda r: r[3] != (1, 0))
        if not solvable:
            raise CaptureError(
                f"the dynamic size {wanted} is not the size of an input's dimension; those are"
                f" {', '.join(sorted({str(size) for _, _, size in places}))}."
            )
        at, i, size, reading = solvable[0]
        factor, offset = reading or (1, 0)
        symbols[wanted] = Symbol(str(wanted), at, i, (hint(size) - offset) // factor, factor, offset)
    shape_env = places[0][2].node.shape_env
    known = {symbol.name: symbol.example for symbol in symbols.values()}
    assumed = [sympy.Ge(s, shape_env.var_to_range[s].lower) for s in symbols if s in shape_env.var_to_range]
    for expression, bounds in ranges.items():
        assumed += [sympy.Ge(expression, bounds.lower)] + ([sympy.Le(expression, bounds.upper)] if bounds.upper.is_Integer else [])
    assumed += [shape_env.replace(guard.expr) for guard in shape_env.guards]
    conditions = dict.fromkeys(print_expression(c) for c in assumed if c is not sympy.true and c.free_symbols <= set(symbols))
    failing = [condition for condition in conditions if not evaluate(condition, known)]
    if failing:
        raise CaptureError(f"torch.export assumed the shape constraint {failing[0]}, which these inputs violate: {known}.")
    flat = tuple(
        shape_of(value) if isinstance(value, Tensor) else size_of(value) if type(value) is int or isinstance(value, SymInt) else None
        for value in inputs
    )
    return DynamicSizes(tuple(symbols.values()), flat, tuple(conditions))
