"""Memory layouts of tensors. A cached tensor keeps the layout that the blocks returned: kernels may round differently for another."""

from __future__ import annotations

import torch
from torch import Tensor

from bwcache_compile.ir.sizes import hint

Order = tuple[int, ...]
"""Dimensions from the outermost in memory to the innermost."""


def memory_order(tensor: Tensor) -> Order | None:
    """Return the order of a tensor's dimensions; None where its rows overlap or leave gaps."""
    strides, shape = [hint(s) for s in tensor.stride()], [hint(s) for s in tensor.shape]
    order = sorted(range(tensor.dim()), key=lambda d: (strides[d], shape[d]), reverse=True)
    expected = 1
    for d in reversed(order):
        if strides[d] != expected:
            return None
        expected *= shape[d]
    return tuple(order)


def slot_order(tensor: Tensor) -> Order:
    """Return the order in which a copy of a tensor is kept: its own, or the plain one where it has none."""
    return memory_order(tensor) or tuple(range(tensor.dim()))


def in_order(tensor: Tensor, order: Order) -> Tensor:
    """Return the same values lying in that order: the tensor itself if it does, else a copy."""
    if memory_order(tensor) == order:
        return tensor
    dense = tensor.permute(order).clone(memory_format=torch.contiguous_format)
    return dense.permute([order.index(d) for d in range(len(order))])
