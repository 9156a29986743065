"""The settings in a manifest, and what the graphs take of them: said once, in the manifest's `config`. Needs no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from bwcache_compile.config import CacheConfig
from bwcache_compile.graph_io import policy_input
from bwcache_compile.policies import POLICIES


@dataclasses.dataclass(frozen=True)
class PolicyInput:
    """One of the policy's inputs: its name in the graphs, its dtype and its length."""

    name: str
    dtype: str
    length: int


def config_in(manifest: Mapping[str, Any]) -> CacheConfig:
    """Return the settings that a manifest holds.

    Raises:
        ValueError, TypeError, OverflowError: They are none; a ConfigError is a ValueError.
    """
    values: dict[str, Any] = {key: float(value) if value in ("inf", "nan") else value for key, value in manifest["config"].items()}
    return CacheConfig(**values)


def policy_inputs(config: CacheConfig) -> list[PolicyInput]:
    """Return the inputs that the policy adds to the compute graph, in order."""
    settings = config.graph_settings
    return [PolicyInput(policy_input(p.name), p.dtype, settings.length(p)) for p in POLICIES[settings.policy].parameters]
