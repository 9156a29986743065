"""One measurement for all ranks that run a model together, so that all take the same decisions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def mean_over_ranks(change: Tensor, references: Sequence[Tensor], group: ProcessGroup) -> Tensor:
    """Return what an indicator measures over the features of all ranks: the mean of their changes, weighted by the size of the references.

    For the paper's indicator that is the change of the features put together, whichever way they are sharded, and whether
    ranks hold parts or copies. One `all_reduce`; a rank whose change is not finite makes it so for all, which policies take for "changed".

    Args:
        change: float32[blocks], what this rank measured.
        references: Features of each block at the last computed step, on this rank.
        group: The ranks.

    Returns:
        float32[blocks], equal on all ranks.
    """
    weights = torch.stack([reference.float().abs().sum() for reference in references]).double()
    sums = torch.stack([change.double() * weights, weights])
    torch.distributed.all_reduce(sums, group=group)
    return (sums[0] / sums[1]).float()
