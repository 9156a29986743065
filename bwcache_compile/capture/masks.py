"""Replace the boolean masks of an index, so that the size of its result is known."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor


def without_masks(
    tensor: Tensor, index: Any, known: Container[Tensor], places: Callable[[Tensor, tuple[int, ...]], tuple[Tensor, ...]]
) -> Any:
    """Replace known masks in an index by integer indices: a tracer does not know how many elements a mask selects.

    Args:
        tensor: What is indexed.
        index: The index.
        known: The tensors whose values are known.
        places: Returns where a mask, expanded to a shape, is true: an index tensor for each dimension.

    Raises:
        IndexError: A mask has another shape than the dimensions that it indexes.
    """
    parts = index if isinstance(index, tuple) else (index,)
    masks = [isinstance(part, Tensor) and part.dtype is torch.bool and part.dim() > 0 and part in known for part in parts]
    if not any(masks):
        return index
    taken = [part.dim() if isinstance(part, Tensor) and part.dtype is torch.bool else int(part is not None) for part in parts]
    found: list[Any] = []
    dimension = 0
    for part, is_mask, count in zip(parts, masks, taken, strict=True):
        if part is Ellipsis:
            count = tensor.dim() - sum(taken) + 1
        if is_mask:
            for size, expected in zip(tensor.shape[dimension : dimension + count], part.shape, strict=True):
                if size != expected:  # which fixes a dynamic size
                    raise IndexError(f"the shape of the mask {tuple(part.shape)} does not match the tensor's, {tuple(tensor.shape)}")
        found += places(part, tuple(part.shape)) if is_mask else [part]
        dimension += count
    return tuple(found)
