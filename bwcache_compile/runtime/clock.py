"""Telling from a context's inputs where it is: two calls at one step, or a run that started over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _may_tell(leaf: Any) -> bool:
    """Latents have rank 3 and more; half-precision timesteps repeat from step to step."""
    return isinstance(leaf, Tensor) and leaf.dim() <= 2 and leaf.dtype not in (torch.float16, torch.bfloat16)


def _direction(old: Tensor, new: Tensor) -> int:
    """Return 1 or -1 where all that differs rises or falls, as times do; else 0.

    The embeddings of two prompts differ both ways. Their masks may not, but hold nothing but 0 and 1.
    """
    if new.is_complex() or new.dtype is torch.bool:
        return 0
    if new.dim() == 2 and all(bool(((leaf == 0) | (leaf == 1)).all()) for leaf in (old, new)):
        return 0
    return bool((new > old).any()) - bool((new < old).any())


class Clock:
    """Learns from the first two calls of a run which input is the time and which way it goes.

    The time is the float32, float64 or integer input of rank 2 or less that differs between them and goes one way in all
    its values; the first of the lowest rank, if there are several. Reading it waits for the device where it lies on one,
    so a caller that gives `step_index` is never asked for it.
    """

    def __init__(self) -> None:
        """Know nothing yet."""
        self._first: list[Any] = []
        self._time: int | None = None
        self._last = 0.0
        self._rises = False

    def start(self, flat: list[Any]) -> None:
        """Take these leaves for the first call of a run."""
        # copies, because a pipeline may write the next timestep into the same tensor
        self._first = [leaf.clone() if isinstance(leaf, Tensor) and leaf.dim() <= 2 else leaf for leaf in flat]
        self._time = None

    def same_moment(self, flat: list[Any]) -> bool:
        """Whether a call is at the first one's step: nothing differs but latents, embeddings and masks.

        False where no input could tell. Where embeddings of rank 2 differ, only an unchanged vector of one value can: the
        time may have come as an embedding.
        """
        differ, told, surely_told = False, False, False
        for old, new in zip(self._first, flat, strict=False):
            if isinstance(new, Tensor) and new.dim() <= 2:
                same = torch.equal(old, new)
                if not same and (new.dim() < 2 or _direction(old, new) != 0):
                    return False
                if not _may_tell(new) and (same or new.dim() < 2):
                    return False  # it may be the time, which repeats in half precision
                differ, told = differ or not same, told or same
                surely_told = surely_told or (same and new.dim() < 2 and new.numel() > 0 and bool((new == new.flatten()[0]).all()))
            elif not isinstance(new, Tensor) and (type(old) is not type(new) or old != new):
                return False
        return surely_told if differ else told

    def went_back(self, flat: list[Any]) -> bool:
        """Read the time of the next call, and say whether it lies before the one read last: the run started over."""
        if self._first:
            turned = [_direction(self._first[i], leaf) if _may_tell(leaf) else 0 for i, leaf in enumerate(flat)]
            self._time = min((i for i, sign in enumerate(turned) if sign), key=lambda i: int(flat[i].dim()), default=None)
            if self._time is not None:
                self._last, self._rises = float(flat[self._time].max()), turned[self._time] > 0
            self._first = []
            return False
        if self._time is None:
            return False
        before, self._last = self._last, float(flat[self._time].max())
        return self._last < before if self._rises else self._last > before
