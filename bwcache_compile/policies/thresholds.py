"""What policies that compare an indicator with `CacheConfig.threshold` have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bwcache_compile.config import CacheConfig
    from bwcache_compile.report import StepRecord


def at_threshold(config: CacheConfig, threshold: float, num_steps: int) -> CacheConfig:
    """Return the settings with a threshold and without anything that delays reuse; see `Policy.at_threshold`."""
    return dataclasses.replace(
        config, threshold=threshold, reuse_interval=2, reuse_fraction=None, tail=0.0, warmup_steps=0, num_steps=num_steps
    )


def no_reuse(evidence: str) -> Callable[[CacheConfig, StepRecord | None], str | None]:
    """Return a policy's `no_reuse`.

    Args:
        evidence: What the smallest indicator shows; `{indicator}` and `{step}` stand for it and its step.
    """

    def explain(config: CacheConfig, smallest: StepRecord | None) -> str | None:
        if config.threshold == 0:
            return None
        if smallest is None:
            return f"at threshold {config.threshold:g}: no finite indicator was measured."
        found = evidence.format(indicator=f"{smallest.indicator:.4g}", step=smallest.step)
        return f"at threshold {config.threshold:g}: {found}"

    return explain
