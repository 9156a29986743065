"""Block caching for diffusion transformers, done in the graph."""

from bwcache_compile.api import find_blocks, transform
from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import (
    CacheWarning,
    CaptureError,
    ConfigError,
    InvariantError,
    NoBlocksFoundError,
    StateError,
    UnsupportedGraphError,
)
from bwcache_compile.graph_text import graph_diff
from bwcache_compile.runtime import CachedModel, CacheState, GuardedState

__version__ = "0.1.0"

__all__ = [
    "CacheConfig",
    "CacheState",
    "CacheWarning",
    "CachedModel",
    "CaptureError",
    "ConfigError",
    "GuardedState",
    "InvariantError",
    "NoBlocksFoundError",
    "StateError",
    "UnsupportedGraphError",
    "find_blocks",
    "graph_diff",
    "transform",
]
