"""Cache the blocks of a model that no graph can be made of: the calls of the blocks' modules are guarded as they are."""

from bwcache_compile.opaque.model import OpaqueModel

__all__ = ["OpaqueModel"]
