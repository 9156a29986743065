"""The cache of one context as a value, and the tensors that go with it into a graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import ConfigError
from bwcache_compile.layout import in_order
from bwcache_compile.program import CachePlan
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
        """Whether the next step reuses."""
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


def slot_shapes(plan: CachePlan, sizes: Mapping[str, int]) -> list[tuple[int, ...]]:
    """Return the shape of each slot where the program's symbols have these values."""
    return [evaluated(slot.shape, sizes) for slot in plan.slots]


def fresh_state(plan: CachePlan, sizes: Mapping[str, int], step: int = 0) -> CacheState:
    """Return the state of a context that has computed nothing, at these sizes; its next step is `step`."""
    shapes = slot_shapes(plan, sizes)
    filled = [torch.full(shape, slot.fill, dtype=slot.dtype, device=plan.device) for slot, shape in zip(plan.slots, shapes, strict=True)]
    slots = (in_order(tensor, slot.order) for slot, tensor in zip(plan.slots, filled, strict=True))
    return CacheState(tuple(slots), step)


def policy_parameters(config: CacheConfig, num_steps: int | None, device: torch.device) -> tuple[Tensor, ...]:
    """Return the values of the graph's `policy_*` inputs, in their order.

    Raises:
        ConfigError: The policy needs the number of steps and it is not known.
    """
    if config.steps_mask is not None:
        return (torch.tensor(config.steps_mask, dtype=torch.int64, device=device),)
    if num_steps is None:
        raise ConfigError(
            "num_steps is not known, and policy='schedule' places the protected tail by it. Set CacheConfig(num_steps=...),"
            " call cached.reset(num_steps=...), or pass num_inference_steps to cache_context."
        )
    numerator, denominator = config.tail_ratio()
    counts = (config.resolved_interval(num_steps), numerator, denominator, config.warmup_steps, num_steps)
    threshold = torch.tensor([config.threshold], dtype=torch.float32, device=device)
    return (threshold, *(torch.tensor([count], dtype=torch.int64, device=device) for count in counts))
