"""Make tensors of the policy's settings, which are inputs of the graphs."""

from __future__ import annotations

import torch
from torch import Tensor

from bwcache_compile.config import CacheConfig


def policy_parameters(config: CacheConfig, num_steps: int | None, device: torch.device | None = None) -> tuple[Tensor, ...]:
    """Return the values of the graph's `policy_*` inputs, in their order.

    Raises:
        ConfigError: The policy needs the number of steps and it is not known.
    """
    dtypes = config.policy_dtypes
    return tuple(
        torch.tensor(value, dtype=getattr(torch, dtypes[name]), device=device) for name, value in config.policy_values(num_steps).items()
    )
