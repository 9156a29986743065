"""What makes the programs and the parts of cached models: the capture and the passes, put together."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from torch import nn

from bwcache_compile import passes
from bwcache_compile.capture.capture import capture
from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import ConfigError
from bwcache_compile.ir.compare import Verify
from bwcache_compile.opaque import OpaqueModel
from bwcache_compile.passes import Guard
from bwcache_compile.runtime import CachedModel, Toolchain


def block_names(blocks: Sequence[str] | None) -> tuple[str, ...]:
    """Return the paths of blocks that a user names; none where they are searched for.

    Raises:
        ConfigError: It is no list of paths.
    """
    if blocks is None:
        return ()
    if isinstance(blocks, str) or not blocks or not all(isinstance(name, str) for name in blocks):
        raise ConfigError(f'blocks must be a list of module paths, such as ["transformer_blocks"], got {blocks!r}.')
    return tuple(blocks)


def toolchain(blocks: Sequence[str] | None, guard: Guard) -> Toolchain:
    """Return what makes the programs of a model, with these blocks and this guard."""
    choices: dict[str, Any] = {"blocks": block_names(blocks), "guard": guard}
    build, explain = functools.partial(passes.build, **choices), functools.partial(passes.explain, **choices)
    return Toolchain(capture=capture, build=build, explain=explain, guard=guard)


@dataclasses.dataclass(frozen=True)
class PartMaker:
    """Makes the cached models of a region model's parts; a value, so that what holds it can be pickled.

    Attributes:
        verify: How each is compared with the original.
    """

    verify: Verify

    def stack(self, stack: nn.Module, config: CacheConfig) -> CachedModel:
        """Return the cached model of a stack of blocks."""
        return CachedModel(stack, config, toolchain(None, "host"), None, self.verify)

    def whole(self, model: nn.Module, config: CacheConfig) -> OpaqueModel:
        """Return the cached model of a whole model, whose outputs are kept."""
        return OpaqueModel(model, config, self.verify)
