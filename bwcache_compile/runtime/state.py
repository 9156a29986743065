"""The cache of one context as a value, and the tensors that go with it into a graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bwcache_compile.config import CacheConfig
from bwcache_compile.layout import in_order
from bwcache_compile.program import CacheSlot
from bwcache_compile.sizes import evaluated


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


def fresh_slots(slots: Sequence[CacheSlot], sizes: Mapping[str, int], device: torch.device) -> tuple[Tensor, ...]:
    """Return the slots of a context that has computed nothing, where the program's symbols have these values."""
    filled = [torch.full(evaluated(slot.shape, sizes), slot.fill, dtype=slot.dtype, device=device) for slot in slots]
    return tuple(in_order(tensor, slot.order) for slot, tensor in zip(slots, filled, strict=True))


def policy_parameters(config: CacheConfig, num_steps: int | None, device: torch.device) -> tuple[Tensor, ...]:
    """Return the values of the graph's `policy_*` inputs, in their order.

    Raises:
        ConfigError: The policy needs the number of steps and it is not known.
    """
    values = config.policy_values(num_steps)
    dtypes = {name: torch.float32 if name == "threshold" else torch.int64 for name in values}
    return tuple(torch.tensor(value, dtype=dtypes[name], device=device) for name, value in values.items())
