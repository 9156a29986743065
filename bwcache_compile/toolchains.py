"""What makes the programs and the parts of cached models: the capture and the passes, put together."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from torch import nn

from bwcache_compile import passes
from bwcache_compile.api_arguments import block_names
from bwcache_compile.capture.capture import capture
from bwcache_compile.config import CacheConfig
from bwcache_compile.ir.compare import Verify
from bwcache_compile.ir.ranks import Ranks
from bwcache_compile.opaque import OpaqueModel
from bwcache_compile.passes import Guard
from bwcache_compile.runtime import CachedModel, Toolchain


def toolchain(blocks: Sequence[str] | None, guard: Guard, ranks: Ranks | None) -> Toolchain:
    """Return what makes the programs of a model, with these blocks and this guard, for ranks that decide together."""
    choices: dict[str, Any] = {"blocks": block_names(blocks), "guard": guard, "ranks": ranks}
    build, explain = functools.partial(passes.build, **choices), functools.partial(passes.explain, **choices)
    return Toolchain(capture, build, explain, guard, passes.outlined, ranks)


@dataclasses.dataclass(frozen=True)
class PartMaker:
    """Makes the cached models of a region model's parts; a value, so that what holds it can be pickled.

    Attributes:
        verify: How each is compared with the original.
        ranks: Those that decide together; None for one process.
    """

    verify: Verify
    ranks: Ranks | None = None

    def stack(self, stack: nn.Module, config: CacheConfig) -> CachedModel:
        """Return the cached model of a stack of blocks."""
        return CachedModel(stack, config, toolchain(None, "host", self.ranks), None, self.verify)

    def whole(self, model: nn.Module, config: CacheConfig) -> OpaqueModel:
        """Return the cached model of a whole model, whose outputs are kept."""
        return OpaqueModel(model, config, self.verify, self.ranks)
