"""How close two results of `generate` are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from bwcache_compile.errors import ConfigError

IDENTICAL = 100.0
"""PSNR reported for equal results."""


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


def _numbers(result: Any) -> Any:
    arrays = [array for array in _arrays(result) if array.dtype.kind in "fiu" and array.size]
    if not arrays:
        raise ConfigError(
            f"generate returned {type(result).__name__} without numbers to compare. Return frames, images or latents: tensors, arrays,"
            " images, or lists of these."
        )
    whole = all(array.dtype == np.uint8 for array in arrays)
    return np.concatenate([array.astype(np.float64).reshape(-1) for array in arrays]), whole


def psnr(result: Any, reference: Any) -> float:
    """Return the PSNR in dB of a result against a reference.

    The peak is 255 for 8-bit images, 1 for values in [0, 1], 2 for values in [-1, 1], and else the reference's range.

    Raises:
        ConfigError: A result holds no numbers, or the two hold different numbers of them.
    """
    (ours, _), (theirs, whole) = _numbers(result), _numbers(reference)
    if ours.shape != theirs.shape:
        raise ConfigError(f"generate returned {theirs.size} numbers at first and {ours.size} now. It must make the same video each time.")
    low, high = float(theirs.min()), float(theirs.max())
    known = 1.0 if low >= 0 else 2.0
    peak = 255.0 if whole else known if max(-low, high) <= 1 else high - low
    error = float(np.mean((ours - theirs) ** 2))
    if math.isnan(error):
        return -math.inf
    if error == 0 or peak == 0:
        return IDENTICAL if error == 0 else -math.inf
    return min(IDENTICAL, 10 * math.log10(peak**2 / error))
