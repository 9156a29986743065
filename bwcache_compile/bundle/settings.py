"""What the graphs take of the settings. Needs no torch."""

from __future__ import annotations

import dataclasses

from bwcache_compile.config import CacheConfig
from bwcache_compile.graph_io import policy_input
from bwcache_compile.policies import POLICIES


@dataclasses.dataclass(frozen=True)
class PolicyInput:
    """One of the policy's inputs: its name in the graphs, its dtype and its length."""

    name: str
    dtype: str
    length: int


def policy_inputs(config: CacheConfig) -> list[PolicyInput]:
    """Return the inputs that the policy adds to the compute graph, in order."""
    settings = config.graph_settings
    return [PolicyInput(policy_input(p.name), p.dtype, settings.length(p)) for p in POLICIES[settings.policy].parameters]
