"""The state that one context carries from step to step, as immutable values."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from bwcache_compile.stepping import Cursor


@dataclasses.dataclass(frozen=True)
class CacheState:
    """Everything that one context carries from step to step.

    Attributes:
        slots: One tensor per slot of the plan, in plan order. They belong to the holder and are never written to.
        cursor: The next step, and which steps reuse.
        version: The model's structure and weights that the cache was made with, where the caller owns the state.
    """

    slots: tuple[Tensor, ...]
    cursor: Cursor = dataclasses.field(default_factory=Cursor)
    version: tuple[int, int] | None = None

    @property
    def step(self) -> int:
        """Index of the next step."""
        return self.cursor.step

    @property
    def reuses_next(self) -> bool:
        """Whether the next step reuses; False if the guard is in the graph, since only the graph knows."""
        return self.cursor.reuses

    @property
    def bytes(self) -> int:
        """Bytes held by the slots."""
        return sum(slot.numel() * slot.element_size() for slot in self.slots)

    def to(self, device: torch.device | str) -> CacheState:
        """Return the same cache with its tensors on a device."""
        return CacheState(tuple(slot.to(device) for slot in self.slots), self.cursor, self.version)

    def at(self, step: int) -> CacheState:
        """Return the same cache before another step."""
        return self if step == self.cursor.step else CacheState(self.slots, self.cursor.at(step), self.version)

    def computed(self, slots: tuple[Tensor, ...], reuse_left: int) -> CacheState:
        """Return the state after the next step was computed."""
        return CacheState(slots, self.cursor.computed(reuse_left), self.version)

    def reused(self) -> CacheState:
        """Return the state after the next step was reused."""
        return CacheState(self.slots, self.cursor.reused(), self.version)


@dataclasses.dataclass(frozen=True)
class GuardedState:
    """What a caller of `step` carries from step to step where the guard is in the graph: tensors alone.

    Attributes:
        slots: One tensor per slot of the plan, the guards' own behind them. They are never written to.
        step: int64[1], index of the next step.
        version: The model's structure and weights that the cache was made with.
    """

    slots: tuple[Tensor, ...]
    step: Tensor
    version: tuple[int, int] | None = None
