"""Which ranks decide together, and the one reduction that lets them: the same measurement on all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bwcache_compile.errors import ConfigError
from bwcache_compile.ir.torch_compat import sum_over_ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The ranks that run a model together, and what this one holds of the tokens.

    Attributes:
        group: Name of their process group. Graphs hold the name, so that they can be copied and compiled.
        parts: Into how many equal parts the tokens are cut; 1 where every rank holds all of them, or it is not said.
        part: Which of them this rank holds.
    """

    group: str
    parts: int = 1
    part: int = 0

    @staticmethod
    def of(process_group: ProcessGroup | None, sequence_group: ProcessGroup | None) -> Ranks | None:
        """Return the ranks of process groups, see `transform`; None without one.

        Raises:
            ConfigError: It is no process group, or this process is no member of it.
        """
        if process_group is None:
            if sequence_group is not None:
                raise ConfigError(
                    "sequence_group says how the tokens are cut, and process_group which ranks decide together: pass process_group, too."
                )
            return None
        _check("process_group", process_group)
        if sequence_group is None:
            return Ranks(process_group.group_name)
        _check("sequence_group", sequence_group)
        return Ranks(process_group.group_name, sequence_group.size(), sequence_group.rank())


def _check(name: str, group: Any) -> None:
    if not torch.distributed.is_available() or not isinstance(group, torch.distributed.ProcessGroup):
        raise ConfigError(
            f"{name} must be a process group of torch.distributed that this process is a member of, such as"
            f" torch.distributed.group.WORLD or mesh.get_group(), got {type(group).__name__}."
        )


def mean_over_ranks(change: Tensor, references: Sequence[Tensor], ranks: Ranks) -> Tensor:
    """Return what an indicator measures over the features of all ranks: the mean of their changes, weighted by the size of the references.

    For the paper's indicator that is the change of the features put together, whichever way they are sharded, and whether
    ranks hold parts or copies. One `all_reduce`; a rank whose change is not finite makes it so for all, which policies take for "changed".

    Args:
        change: float32[blocks], what this rank measured.
        references: Features of each block at the last computed step, on this rank; one without rows was not measured here.
        ranks: The ranks.

    Returns:
        float32[blocks], equal on all ranks.
    """
    weights = torch.stack([reference.float().abs().sum() for reference in references]).double()
    changed = change.double() * weights
    if ranks.parts > 1:  # else no rank is without rows, and a dynamic size need not be looked at
        pairs = zip(references, changed, weights, strict=True)
        changed = torch.stack([mine if reference.numel() else weight for reference, mine, weight in pairs])
    sums = sum_over_ranks(torch.stack([changed, weights]), ranks.group)
    return (sums[0] / sums[1]).float()
