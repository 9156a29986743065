"""Make tensors of what the graphs take of the settings."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from bwcache_compile.config import CacheConfig


def policy_parameters(
    config: CacheConfig, num_steps: int | None, device: torch.device | None = None, names: Iterable[str] | None = None
) -> tuple[Tensor, ...]:
    """Return the values of the graph's `policy_*` inputs, in their order; with `names` of these parameters only, in this order.

    Raises:
        ConfigError: The policy needs the number of steps and it is not known.
    """
    dtypes = {parameter.name: getattr(torch, parameter.dtype) for parameter in config.graph_settings.parameters}
    values = config.policy_values(num_steps, names)
    return tuple(torch.tensor(value, dtype=dtypes[name], device=device) for name, value in values.items())
