"""How close two results of `generate` are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from bwcache_compile.errors import ConfigError

IDENTICAL = 100.0
"""PSNR reported for equal results."""
_BATCHED = 4
"""Dimensions of an array whose first one counts clips or images."""
_PIECE = 2**22
"""Numbers compared at a time."""


def _arrays(result: Any) -> list[Any]:
    """Return what a result holds as arrays: tensors, arrays, images, and lists, tuples, tables or objects of these."""
    if isinstance(result, Tensor):
        return [result.detach().float().cpu().numpy()] if result.is_floating_point() else [result.detach().cpu().numpy()]
    if isinstance(result, np.ndarray):
        return [result]
    if hasattr(result, "__array_interface__"):  # an image
        return [np.asarray(result)]
    if isinstance(result, dict):
        return [array for value in result.values() for array in _arrays(value)]
    if isinstance(result, (list, tuple)):
        return [array for value in result for array in _arrays(value)]
    return []


def _items(array: Any) -> list[Any]:
    """Part an array into the clips or images that its first dimension counts, if it has as many dimensions as those have."""
    return list(array) if array.ndim >= _BATCHED else [array]


def _numbers(result: Any) -> list[Any]:
    """Return the numbers of each clip or image of a result, flat."""
    arrays = [item.reshape(-1) for array in _arrays(result) if array.dtype.kind in "fiu" and array.size for item in _items(array)]
    if not arrays:
        raise ConfigError(
            f"generate must return the frames, images or latents that it made (tensors, arrays, images, or lists of these), got"
            f" {type(result).__name__} without numbers to compare."
        )
    return arrays


def _squared_error(ours: Any, theirs: Any) -> float:
    """Return the sum of squared differences, piece by piece: videos are large."""
    pieces = range(0, theirs.size, _PIECE)
    return sum(float(np.sum((ours[i : i + _PIECE].astype(np.float64) - theirs[i : i + _PIECE]) ** 2)) for i in pieces)


def psnr(result: Any, reference: Any) -> float:
    """Return the PSNR in dB of a result against a reference, the mean over its clips or images.

    One clip that goes another way must not decide alone, as it would in a mean over all numbers.

    The peak is 255 for 8-bit images, 1 for values in [0, 1], 2 for values in [-1, 1], and else the reference's range.

    Raises:
        ConfigError: A result holds no numbers, or the two hold different numbers of them.
    """
    ours, theirs = _numbers(result), _numbers(reference)
    sizes = [[array.size for array in arrays] for arrays in (ours, theirs)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"generate returned {sum(sizes[1])} elements at first and {sum(sizes[0])} now. It must make the same video each time."
        )
    low, high = min(float(array.min()) for array in theirs), max(float(array.max()) for array in theirs)
    whole, known = all(array.dtype == np.uint8 for array in theirs), 1.0 if low >= 0 else 2.0
    peak = 255.0 if whole else known if max(-low, high) <= 1 else high - low
    each = [_ratio(_squared_error(a, b) / a.size, peak) for a, b in zip(ours, theirs, strict=True)]
    return sum(each) / len(each)


def _ratio(error: float, peak: float) -> float:
    """Return the PSNR of a mean squared error."""
    if error == 0:
        return IDENTICAL
    return min(IDENTICAL, 10 * math.log10(peak**2 / error)) if error < math.inf and peak > 0 else -math.inf
