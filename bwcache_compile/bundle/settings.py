"""What the graphs take of the settings. Needs no torch."""

from __future__ import annotations

import dataclasses

from bwcache_compile.config import CacheConfig
from bwcache_compile.graph_io import policy_input


@dataclasses.dataclass(frozen=True)
class PolicyInput:
    """One of the settings that graphs take: the parameter's name, its name in the graphs, its dtype and its shape."""

    parameter: str
    name: str
    dtype: str
    shape: tuple[int, ...]


def policy_inputs(config: CacheConfig) -> list[PolicyInput]:
    """Return what the graphs take of the settings, in order."""
    settings = config.graph_settings
    return [PolicyInput(p.name, policy_input(p.name), p.dtype, settings.shape(p)) for p in settings.parameters]
