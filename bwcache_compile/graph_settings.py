"""The settings that shape the graphs. Needs no torch."""

from __future__ import annotations

import dataclasses
from typing import Literal

from bwcache_compile.policies import POLICIES, REUSES, Parameter, Reuse

Granularity = Literal["stack", "block"]
Cut = Literal["blocks", "output"]
BatchReduce = Literal["joint", "max", "per_sample"]
"""How the samples of a batch decide."""


@dataclasses.dataclass(frozen=True)
class GraphSettings:
    """The settings that shape the graphs: two configurations that agree in these can use the same graphs.

    The fields are those of `CacheConfig`; every other setting is a value that the graphs take as input, or is read outside of them.

    Attributes:
        mask_steps: Entries of `steps_mask`, 0 where there is none: the mask is an input of that length.
    """

    policy: str
    reuse: str
    anchors: int
    cut: Cut
    indicator: str
    granularity: Granularity
    batch_reduce: BatchReduce
    compute_first: int
    compute_last: int
    indicator_blocks: int | Literal["all"]
    indicator_tokens: int | Literal["all"]
    mask_steps: int

    @property
    def way(self) -> Reuse:
        """What is kept and returned."""
        way = REUSES[self.reuse]
        return way if self.anchors == way.anchors or way.with_anchors is None else way.with_anchors(self.anchors)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """What the graphs take of the settings, in order: what decides, then what is summed."""
        return (*POLICIES[self.policy].parameters, *self.way.parameters)

    def shape(self, parameter: Parameter) -> tuple[int, ...]:
        """Return the shape of one of the parameters."""
        return (max(1, self.mask_steps) if parameter.per_step else 1, *([parameter.columns] if parameter.columns else []))
