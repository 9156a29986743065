"""Follow dynamic sizes through tensors that hold them, so that Python reads symbolic sizes from these tensors."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.utils.weak import WeakIdKeyDictionary

from bwcache_compile.ir.torch_compat import pytree
from bwcache_compile.size_expressions import largest, smallest

Nested = Any
"""What a tensor of sizes holds: a number, ints and symbolic ints alike, or a list of these for each dimension."""

UNKNOWN = object()
"""Stands for the result of a function that is not followed."""

_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "floor_divide": operator.floordiv, "remainder": operator.mod,
    "__floordiv__": operator.floordiv, "__mod__": operator.mod, "neg": operator.neg,
    "rsub": lambda a, b: b - a, "__rsub__": lambda a, b: b - a, "__radd__": operator.add, "__rmul__": operator.mul,
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{f"__{name}__": getattr(operator, name) for name in ("add", "sub", "mul", "eq", "ne", "lt", "le", "gt", "ge")},
    "maximum": largest, "minimum": smallest,
}  # fmt: skip
_REDUCTIONS: dict[str, Callable[[list[Any]], Any]] = {
    "sum": lambda values: functools.reduce(operator.add, values), "prod": lambda values: functools.reduce(operator.mul, values),
    "max": lambda values: largest(*values), "amax": lambda values: largest(*values),
    "min": lambda values: smallest(*values), "amin": lambda values: smallest(*values),
}  # fmt: skip
_SAME = {"to", "long", "int", "cuda", "cpu", "clone", "contiguous", "detach", "detach_"}
_MADE = {"tensor", "as_tensor", "scalar_tensor"}
READS_OF_SIZES: dict[str, Callable[[Nested], Any]] = {
    "item": lambda held: held, "tolist": lambda held: held, "__bool__": bool, "__int__": int, "__index__": int,
}  # fmt: skip
_FOLLOWED = {
    *_ELEMENTWISE, *_REDUCTIONS, *_SAME, *_MADE, *READS_OF_SIZES,
    "stack", "cat", "unbind", "unsqueeze", "__getitem__", "new_tensor", "div", "cumsum",
}  # fmt: skip


class _NotFollowedError(Exception):
    """A function computes something from sizes that is not followed."""


def _mapped(function: Callable[..., Any], *held: Nested) -> Nested:
    """Apply a function element by element; a number goes with every element."""
    counts = {len(part) for part in held if isinstance(part, list)}
    if not counts:
        return function(*held)
    if len(counts) > 1:
        raise _NotFollowedError
    return [_mapped(function, *(part[i] if isinstance(part, list) else part for part in held)) for i in range(counts.pop())]


def _flat(held: Nested) -> list[Any]:
    return [value for part in held for value in _flat(part)] if isinstance(held, list) else [held]


def _indexed(held: Nested, index: tuple[Any, ...]) -> Nested:
    if not index:
        return held
    first, *rest = index
    if first is None:
        return [_indexed(held, tuple(rest))]
    if not isinstance(held, list):
        raise _NotFollowedError
    if type(first) is int:
        return _indexed(held[first], tuple(rest))
    if isinstance(first, slice) and all(type(bound) in (int, type(None)) for bound in (first.start, first.stop, first.step)):
        return [_indexed(part, tuple(rest)) for part in held[first]]
    raise _NotFollowedError


class KnownSizes:
    """Remembers which sizes each tensor holds."""

    def __init__(self) -> None:
        """Know none."""
        self._held: Any = WeakIdKeyDictionary()

    def knows(self, tensor: Tensor) -> bool:
        """Whether the sizes that a tensor holds are known."""
        return tensor in self._held

    def number(self, tensor: Tensor) -> Any:
        """Return the size that a 0-dim tensor holds; None if the tensor has dimensions or is unknown."""
        held = self._held.get(tensor)
        return None if isinstance(held, list) else held

    def tensor(self, held: Nested, options: dict[str, Any]) -> Tensor:
        """Return a tensor that holds these sizes, which stay symbolic."""
        if isinstance(held, list):
            return torch.stack([self.tensor(part, options) for part in held])
        return torch.scalar_tensor(held, **options)

    def forget(self, written: list[Tensor]) -> None:
        """Forget every tensor that shares memory with one that is written to."""
        memory = {tensor.untyped_storage()._cdata for tensor in written} if len(self._held) else set()
        for other in [other for other in self._held if other.untyped_storage()._cdata in memory]:
            self._held.pop(other, None)

    def keep(self, result: Any, held: Nested) -> None:
        """Record the sizes that a function returned, in one tensor or several."""
        for tensor, part in zip(
            [result] if isinstance(result, Tensor) else result, [held] if isinstance(result, Tensor) else held, strict=True
        ):
            if not tensor.is_floating_point():
                self._held[tensor] = part

    def run(self, name: str, args: Any, kwargs: Any, leaves: list[Any], numbers: Any) -> Any:
        """Apply a function to known sizes; return nested sizes, or what Python reads, or `UNKNOWN` if it is not followed.

        Args:
            name: Name of the function.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            leaves: The leaves of both.
            numbers: Tensors that hold plain numbers, and these numbers as real tensors.
        """
        if name not in _FOLLOWED:
            return UNKNOWN
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        known = all(tensor in self._held or (tensor in numbers and not tensor.is_floating_point()) for tensor in tensors)
        opened = any(isinstance(leaf, SymInt) for leaf in leaves) or any(tensor in self._held for tensor in tensors)
        if not opened or not (known or name == "new_tensor"):
            return UNKNOWN

        def lookup(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and name != "new_tensor":
                return self._held[leaf] if leaf in self._held else numbers[leaf].tolist()
            return leaf

        try:
            return self._follow(name, pytree.tree_map(lookup, args), kwargs)
        except _NotFollowedError:
            return UNKNOWN

    def _follow(self, name: str, args: Any, kwargs: Any) -> Any:
        if name in READS_OF_SIZES:
            return READS_OF_SIZES[name](args[0])
        if name in _SAME:
            return args[0]
        if name in _MADE or name == "new_tensor":
            return _listed(args[-1] if name == "new_tensor" else args[0])
        if name == "div" and kwargs == {"rounding_mode": "floor"}:
            name, kwargs = "floor_divide", {}
        if name in _ELEMENTWISE and not kwargs:
            return _mapped(_ELEMENTWISE[name], *args)
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if name in ("stack", "cat") and dim in (None, 0):
            return list(args[0]) if name == "stack" else [value for part in args[0] for value in part]
        if name == "unbind" and dim in (None, 0):
            return list(args[0])
        if name == "unsqueeze" and dim == 0:
            return [args[0]]
        if name == "cumsum" and dim in (0, -1) and isinstance(args[0], list) and not isinstance(args[0][0], list):
            return list(itertools.accumulate(args[0]))
        if name == "__getitem__":
            return _indexed(args[0], args[1] if isinstance(args[1], tuple) else (args[1],))
        if name in _REDUCTIONS and set(kwargs) <= {"dim", "dtype"}:
            return self._reduced(name, args[0], dim)
        raise _NotFollowedError

    def _reduced(self, name: str, held: Nested, dim: Any) -> Nested:
        reduction = _REDUCTIONS[name]
        if dim is None:
            return reduction(_flat(held))
        nested = isinstance(held, list) and bool(held) and isinstance(held[0], list) and not isinstance(held[0][0], list)
        if name in ("max", "min") or not nested or dim not in (-1, 1):
            raise _NotFollowedError
        return [reduction(row) for row in held]


def _listed(made: Any) -> Nested:
    if isinstance(made, (list, tuple, torch.Size)):
        return [_listed(part) for part in made]
    if type(made) is int or isinstance(made, SymInt):
        return made
    raise _NotFollowedError
