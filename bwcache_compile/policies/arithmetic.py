"""Integer arithmetic that every runtime does alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def quotient(a: Tensor, b: int | Tensor) -> Tensor:
    """Divide int64 numbers, rounded down, where a >= 0, b > 0 and the result is below 2**20.

    Without shifts and integer divisions, which runtimes take apart in their own ways or do not know; the half makes
    up for a division that is not rounded exactly.
    """
    import torch

    return ((a - a % b).to(torch.float32) / b + 0.5).to(torch.int64)
