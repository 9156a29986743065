"""What Python may read of tensors while a model is traced: values that follow from shapes and numbers alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

_MOST = 4096
"""Elements of the largest tensor that is followed: grids, lengths and offsets are short."""

_MADE_OF_NUMBERS = {"tensor", "as_tensor", "arange", "zeros", "ones", "full", "eye", "linspace"}
_MADE_BESIDE = {"new_tensor", "new_zeros", "new_ones", "new_full"}
"""They take a tensor's dtype and device, and nothing else of it."""
_UNTOLD = ("rand", "normal", "bernoulli", "multinomial", "dropout", "empty", "uniform", "poisson", "exponential", "geometric", "cauchy")
"""In the names of functions whose results do not follow from what they are given."""


_SYMBOLS = (SymInt, SymFloat, SymBool)


def _leaves(tree: Any) -> list[Any]:
    """Return what a call was given, the bounds of slices too."""
    found = []
    for leaf in pytree.tree_leaves(tree):
        found += [leaf.start, leaf.stop, leaf.step] if isinstance(leaf, slice) else [leaf]
    return found


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in _leaves(tree) if isinstance(leaf, Tensor)]


def _small(tensors: Iterable[Tensor]) -> bool:
    return all(tensor.numel() <= _MOST for tensor in tensors)


_IN_PLACE = {"__setitem__", *(f"__i{op}__" for op in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"))}


def _written(name: str, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors that a function writes to, going by its name."""
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    return _tensors((args[:1] if in_place else (), kwargs.get("out")))


class KnownValues(TorchFunctionMode):
    """While active, a tensor that was made of shapes and numbers is read in Python as what it holds.

    Original video models carry sizes around as tensors (`torch.tensor(x.shape[2:])`, and `.tolist()` in every block). A
    tracer knows no tensor's values, and would give each number that is read a symbol. Here a real tensor stands beside
    each one that is made of numbers, every function of such tensors is run on the real ones too, and what Python reads is
    read off those. The graph is traced as ever. Nothing that depends on an input, a weight or chance is known.
    """

    def __init__(self) -> None:
        """Know nothing yet."""
        super().__init__()
        self._real: Any = WeakIdKeyDictionary()

    def value(self, traced: Tensor) -> Tensor | None:
        """Return what a tensor holds, where that is known."""
        known: Tensor | None = self._real.get(traced)
        return known

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function; where it follows from what is known, run it on the known values too."""
        kwargs = kwargs or {}
        name, given = getattr(func, "__name__", ""), _tensors((args, kwargs))
        if isinstance(func, (OpOverload, OpOverloadPacket)):  # called by itself, it may write to anything
            self._forget(given)
            return func(*args, **kwargs)
        told = not any(part in name for part in _UNTOLD)
        told = told and not any(isinstance(leaf, _SYMBOLS) for leaf in _leaves((args, kwargs)))
        if told and given and all(tensor in self._real for tensor in given):
            real = self._run(func, args, kwargs)
            if not _tensors(real) and not _written(name, args, kwargs):
                return real
            return self._beside(func(*args, **kwargs), real)
        self._forget(_written(name, args, kwargs))
        result = func(*args, **kwargs)
        if told and name in _MADE_OF_NUMBERS and not given and _small(_tensors(result)):
            return self._beside(result, self._run(func, args, kwargs))
        if told and name in _MADE_BESIDE and not _tensors((args[1:], kwargs)) and _small([result]):
            with _disable_current_modes():
                like = torch.empty(0, dtype=args[0].dtype, device=args[0].device)
                return self._beside(result, func(like, *args[1:], **kwargs))
        return result

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        def lookup(leaf: Any) -> Any:
            if isinstance(leaf, slice):
                return slice(lookup(leaf.start), lookup(leaf.stop), lookup(leaf.step))
            return self._real[leaf] if isinstance(leaf, Tensor) else leaf

        real_args, real_kwargs = pytree.tree_map(lookup, (args, kwargs))
        with _disable_current_modes():
            return func(*real_args, **real_kwargs)

    def _beside(self, result: Any, real: Any) -> Any:
        for traced, known in zip(_tensors(result), _tensors(real), strict=True):
            if _small([known]):
                self._real[traced] = known
        return result

    def _forget(self, written: list[Tensor]) -> None:
        """Forget tensors that something unknown is written to, and all that share memory with them."""
        for tensor in written:
            if tensor in self._real:
                memory = self._real[tensor].untyped_storage().data_ptr()
                for other in [t for t, real in self._real.items() if real.untyped_storage().data_ptr() == memory]:
                    del self._real[other]
