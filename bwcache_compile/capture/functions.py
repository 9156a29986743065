"""What torch functions read, write and take, by their names; the leaves of their arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor, nn

from bwcache_compile.ir.torch_compat import pytree

MADE_OF_NUMBERS = {"tensor", "as_tensor", "arange", "zeros", "ones", "full", "eye", "linspace"}
"""Make a tensor of the numbers that they are given."""
MADE_LIKE = {"new_tensor", "new_zeros", "new_ones", "new_full"}
"""Make a tensor of the numbers that they are given; of another tensor they take only dtype and device."""
_RANDOM = (
    "rand", "normal", "bernoulli", "multinomial", "dropout", "empty", "uniform", "poisson", "exponential", "geometric", "cauchy",
)  # fmt: skip
"""Occur in the names of functions whose results do not follow from their arguments."""
_IN_PLACE = {
    "__setitem__",
    *(f"__i{op}__" for op in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")),
}
_METADATA = {
    "__len__", "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "get_device",
    "is_contiguous", "is_floating_point", "is_complex", "is_signed", "is_tensor",
}  # fmt: skip
_METADATA_PROPERTIES = {
    "shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_meta", "requires_grad", "names", "itemsize", "nbytes",
}  # fmt: skip
METADATA_UNLESS_TENSOR = {"__get__", "type"}
"""Return metadata where they do not return a tensor."""
READS = {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__", "equal", "allclose"}
"""Return a tensor's values to Python."""
MAKES = {"zeros", "ones", "full", "empty", "rand", "randn", "arange", "linspace", "eye"}
"""Make a tensor; their first argument is a size or a number, and never the tensor that they work on."""
TAKES_SIZES = MAKES | {
    "view", "reshape", "expand", "broadcast_to", "repeat", "tile", "unflatten", "permute", "split", "narrow", "chunk", "roll", "pad",
    "new_zeros", "new_ones", "new_full", "new_empty", "unfold", "interpolate", "flatten", "as_strided", "repeat_interleave",
}  # fmt: skip
"""Accept 0-dim tensors where they expect ints, and read their values without calling `item`."""
SYMBOLS = (SymInt, SymFloat, SymBool)
_ATOMS = {Tensor, nn.Parameter, *SYMBOLS, int, float, bool, str, type(None), torch.dtype, torch.device}


def is_metadata(func: Any, name: str) -> bool:
    """Whether a function queries metadata, and never reads tensor data."""
    return name in _METADATA or (name == "__get__" and getattr(getattr(func, "__self__", None), "__name__", "") in _METADATA_PROPERTIES)


def is_random(name: str) -> bool:
    """Whether the result of a function does not follow from its arguments."""
    return any(part in name for part in _RANDOM)


def leaves_of(tree: Any) -> list[Any]:
    """Return the leaves of a function's arguments; the bounds of a slice are leaves too.

    This runs for every function that a traced model calls, so the common types skip `pytree`, which is slow.
    """
    kind = type(tree)
    if kind in _ATOMS:
        return [tree]
    if kind is tuple or kind is list:
        return [leaf for part in tree for leaf in leaves_of(part)]
    if kind is dict:
        return [leaf for part in tree.values() for leaf in leaves_of(part)]
    if kind is slice:
        return [tree.start, tree.stop, tree.step]
    found = pytree.tree_leaves(tree)
    return [tree] if len(found) == 1 and found[0] is tree else [leaf for part in found for leaf in leaves_of(part)]


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors among the leaves of a function's arguments or results."""
    return [leaf for leaf in leaves_of(tree) if isinstance(leaf, Tensor)]


def mapped(function: Any, tree: Any) -> Any:
    """Apply a function to each leaf of the arguments of a call, and to the bounds of slices."""

    def of_leaf(leaf: Any) -> Any:
        return slice(*map(function, (leaf.start, leaf.stop, leaf.step))) if isinstance(leaf, slice) else function(leaf)

    return pytree.tree_map(of_leaf, tree)


def written_by(name: str, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors that a function writes to, judged by its name and its `out` argument."""
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__") and name not in ("detach_", "requires_grad_"))
    return tensors_in((args[:1] if in_place else (), kwargs.get("out")))
