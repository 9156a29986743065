"""A fixed mask of steps; nothing is measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bwcache_compile.policies.definitions import Parameter, Policy, Values

if TYPE_CHECKING:
    from torch import Tensor

    from bwcache_compile.config import CacheConfig


def static(mask: Tensor, step: Tensor) -> Tensor:
    """Count the entries of `mask` (int64[S], 1 reuses) that follow `step` without a gap.

    Returns:
        int64[1], how many of the following steps reuse.
    """
    import torch

    places = torch.arange(mask.shape[0], device=mask.device)
    computes = (places > step) & (mask == 0)
    following = torch.where(computes, places, torch.full_like(places, mask.shape[0]))
    return following.min().reshape(1) - step - 1


def _values(config: CacheConfig, num_steps: int | None) -> dict[str, Values]:
    assert config.steps_mask is not None
    return {"mask": config.steps_mask}


STATIC = Policy(decide=static, values=_values, parameters=(Parameter("mask", per_step=True),))
