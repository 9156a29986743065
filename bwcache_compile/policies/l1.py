"""The paper's indicator: relative L1 change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def relative_change(features: Sequence[Tensor], references: Sequence[Tensor]) -> Tensor:
    """L1rel of each measured block against its last computed features (paper, eq. 5-6).

    Sums are float32 whatever the dtype: a float16 sum overflows and would read as "no change". Against the zeros of a
    fresh state the result is infinite or NaN, which every policy takes for "changed".

    Args:
        features: One tensor per measured block, any floating dtype and shape.
        references: The same blocks at the last computed step.

    Returns:
        float32[blocks].
    """
    import torch

    ratios = []
    for feature, reference in zip(features, references, strict=True):
        old = reference.float()
        ratios.append((feature.float() - old).abs().sum() / old.abs().sum())
    return torch.stack(ratios)
