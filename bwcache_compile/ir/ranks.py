"""Which ranks decide together, the one reduction that lets them, and how they capture a model together or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bwcache_compile.errors import CaptureError, ConfigError, InvariantError, NoBlocksFoundError, UnsupportedGraphError
from bwcache_compile.ir.torch_compat import gather_over_ranks, ranks_of, sum_over_ranks

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
            ConfigError: It is no process group, or this process is no member of it; or ranks of the sequence are not in it.
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
        outside = ranks_of(sequence_group) - ranks_of(process_group)
        if outside:
            raise ConfigError(
                f"rank {min(outside)} is in sequence_group and not in process_group: the ranks of one sequence decide together. Pass a"
                " process_group of all ranks that run the model together, such as torch.distributed.group.WORLD."
            )
        return Ranks(process_group.group_name, sequence_group.size(), sequence_group.rank())


def _check(name: str, group: Any) -> None:
    if not torch.distributed.is_available() or not isinstance(group, torch.distributed.ProcessGroup):
        raise ConfigError(
            f"{name} must be a process group of torch.distributed that this process is a member of, such as"
            f" torch.distributed.group.WORLD or mesh.get_group(), got {type(group).__name__}."
        )


def check_group(model: str, operator: str, group: str, ranks: Ranks) -> None:
    """Refuse blocks that communicate over a process group, by its name, whose ranks do not all decide together.

    Args:
        model: Its name.
        operator: What communicates.
        group: The process group.
        ranks: Those that decide together.

    Raises:
        ConfigError: One of its ranks may reuse a step that another one computes.
    """
    if ranks_of(group) - ranks_of(ranks.group):
        raise ConfigError(
            f"the blocks of {model} communicate with ranks that are not in process_group (`{operator}`) and would decide otherwise. Pass a"
            " process_group of all ranks that run the model together, such as torch.distributed.group.WORLD."
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


def named(error: Exception) -> str:
    """Return the kind of an error and what it says."""
    return f"{type(error).__name__}: {error}"


class Agreement:
    """Lets ranks capture a model in step: what fails on one of them has failed on all of them, for the same reason.

    Ranks exchange how each stage ended on them before the next one, which may run collectives of the model or of its graph. All of them
    must go through it at the same call, so it is for the first capture of a model: later ones may come at different calls.
    """

    def __init__(self, name: str, ranks: Ranks | None) -> None:
        """Agree on the capture of the model with this name; without ranks every exchange is with this process alone."""
        self._name, self._ranks = name, ranks
        self._over = ranks is None

    def joint(self, wrong: str | None) -> str | None:
        """Return why a stage failed on any rank; None if it succeeded on all of them.

        Args:
            wrong: Why it failed on this one; None if it succeeded.

        Raises:
            CaptureError: Another rank has given up.
        """
        if self._over:
            return wrong
        said = self._exchange(False, wrong)
        if self._over:
            raise self._refusal(said)
        return _told(said, wrong)

    @contextlib.contextmanager
    def to_the_end(self) -> Iterator[Agreement]:
        """Wait at the end of the block for the end on all ranks.

        Raises:
            CaptureError: The block failed on another rank.
        """
        try:
            yield self
        except (CaptureError, ConfigError, InvariantError, NoBlocksFoundError, UnsupportedGraphError) as error:
            if self._over:
                raise
            said = self._exchange(True, named(error))
            if _told(said, named(error)) == named(error):
                raise  # as in one process
            raise self._refusal(said) from error
        if not self._over:
            said = self._exchange(True, None)
            if any(text is not None for text in said.values()):
                raise self._refusal(said)

    def _exchange(self, ends: bool, wrong: str | None) -> Mapping[int, str | None]:
        """Return why it failed on each rank. It is over where a rank has given up."""
        assert self._ranks is not None
        said = gather_over_ranks((ends, wrong), self._ranks.group)
        self._over = ends or any(ended and text is not None for ended, text in said.values())
        return {rank: text for rank, (_, text) in said.items()}

    def _refusal(self, said: Mapping[int, str | None]) -> CaptureError:
        why = _told(said, next(iter(said.values())))
        return CaptureError(
            f"could not capture {self._name} on every rank of the process group, so no rank captures it.\n  {why}\n"
            "  Ranks that run a model together must run the same code on inputs of the same kind."
        )


def _told(said: Mapping[int, str | None], own: str | None) -> str | None:
    """Return what ranks said; what this one said where all of them said the same."""
    if len(set(said.values())) == 1:
        return own
    return "\n  ".join(f"on rank {rank}: {text}" for rank, text in said.items() if text is not None)


ALONE = Agreement("", None)
"""Agrees with nobody."""
