"""Telling from a context's inputs where it is: two calls at one step, or a run that started over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _may_tell(leaf: Any) -> bool:
    """Latents and embeddings have rank 3 and more; half-precision timesteps repeat from step to step."""
    return isinstance(leaf, Tensor) and leaf.dim() <= 2 and leaf.dtype not in (torch.float16, torch.bfloat16)


class Clock:
    """Learns from the first two calls of a run which input is the time and which way it goes.

    The time is the first float32, float64 or integer input of rank 2 or less that differs between them. Reading it waits for the
    device where it lies on one, so a caller that gives `step_index` is never asked for it.
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
        """Whether a call is at the first one's step: nothing differs but latents and embeddings.

        False where no input could tell.
        """
        told = False
        for old, new in zip(self._first, flat, strict=False):
            if isinstance(new, Tensor) and new.dim() <= 2:
                if not _may_tell(new) or not torch.equal(old, new):
                    return False
                told = True
            elif not isinstance(new, Tensor) and (type(old) is not type(new) or old != new):
                return False
        return told

    def went_back(self, flat: list[Any]) -> bool:
        """Read the time of the next call, and say whether it lies before the one read last: the run started over."""
        if self._first:
            differ = (i for i, leaf in enumerate(flat) if _may_tell(leaf) and not torch.equal(self._first[i], leaf))
            self._time = next(differ, None)
            if self._time is not None:
                self._last = float(flat[self._time].max())
                self._rises = self._last > float(self._first[self._time].max())
            self._first = []
            return False
        if self._time is None:
            return False
        before, self._last = self._last, float(flat[self._time].max())
        return self._last < before if self._rises else self._last > before
