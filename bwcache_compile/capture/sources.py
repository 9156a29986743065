"""The tensors whose values a model may read in Python while it is traced."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bwcache_compile.ir.call_signature import Reading
from bwcache_compile.ir.torch_compat import pytree

_MOST = 4096
"""Elements of the largest tensor that is followed: grids, lengths and offsets are short."""

Source = int | str
"""Where a known value comes from: an input, by its position among the leaves of the call, or a buffer, by its name."""
Origin = Source | Reading
"""A source, or a value that the model computes from an input that is too large to be followed itself."""


def is_short(tensor: Tensor) -> bool:
    """Whether a tensor is small enough that its values are followed."""
    return tensor.numel() <= _MOST


def inputs_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int, Tensor]:
    """Return the tensors of a call, by position among its leaves."""
    leaves = pytree.tree_leaves((args, kwargs))
    return {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}


def sources(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Source, Tensor]:
    """Return the tensors whose values a model may read in Python: short masks, lengths and sizes of a call, and short buffers."""
    found: dict[Source, Tensor] = dict(inputs_of(args, kwargs).items())
    found |= {name: buffer for name, buffer in model.named_buffers() if buffer is not None}
    static = {name: t for name, t in found.items() if all(isinstance(size, int) for size in t.shape)}
    return {name: t for name, t in static.items() if is_short(t) and (t.dim() <= 1 or isinstance(name, str) or not t.is_floating_point())}
