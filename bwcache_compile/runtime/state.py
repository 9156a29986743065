"""The cache of one context as a value."""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class CacheState:
    """Everything that one context carries from step to step.

    Attributes:
        slots: One tensor per slot of the plan, in plan order. They belong to the holder and are never written to.
        step: Index of the next step.
        computed_at: The last computed step, or -1.
        reuse_until: The last step that reuses; decided in the graph at `computed_at`.
    """

    slots: tuple[Tensor, ...]
    step: int = 0
    computed_at: int = -1
    reuse_until: int = -1

    @property
    def reuses_next(self) -> bool:
        """Whether the next step reuses; never where the guard is in the graph and nobody else knows."""
        return 0 <= self.computed_at < self.step <= self.reuse_until

    @property
    def bytes(self) -> int:
        """Bytes held by the slots."""
        return sum(slot.numel() * slot.element_size() for slot in self.slots)

    def computed(self, slots: tuple[Tensor, ...], reuse_left: int) -> CacheState:
        """Return the state after the next step was computed."""
        return CacheState(slots, self.step + 1, self.step, self.step + reuse_left)

    def reused(self) -> CacheState:
        """Return the state after the next step was reused."""
        return dataclasses.replace(self, step=self.step + 1)


@dataclasses.dataclass(frozen=True)
class GuardedState:
    """What a caller of `step` carries from step to step where the guard is in the graph: tensors alone.

    Attributes:
        slots: One tensor per slot of the plan, the guards' own behind them. They are never written to.
        step: int64[1], index of the next step.
    """

    slots: tuple[Tensor, ...]
    step: Tensor
