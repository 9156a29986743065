"""Make tensors of what the graphs take of the settings."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from bwcache_compile.config import CacheConfig
from bwcache_compile.policies import POLICIES
from bwcache_compile.policies.definitions import takes


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


def host_decision(config: CacheConfig, num_steps: int | None, step: int) -> int | None:
    """Return how many steps reuse after a computed one, where that follows from the settings and the step, as with a mask.

    The policy's own `decide` runs on the host, so that nobody waits for a device.

    Returns:
        None where the policy goes by what is measured, or by what it keeps: then the graph's decision is read.
    """
    policy = POLICIES[config.policy]
    if policy.measures or policy.slots:
        return None
    names = [parameter.name for parameter in policy.parameters]
    values = dict(zip(names, policy_parameters(config, num_steps, torch.device("cpu"), names), strict=True))
    values["step"] = torch.tensor([step])
    return int(policy.decide(*(values[name] for name in takes(policy.decide))))
