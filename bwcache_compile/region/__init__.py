"""Caching for models that cannot be captured whole: their stacks of blocks are captured alone, and their own Python calls these."""

from bwcache_compile.region.model import RegionModel

__all__ = ["RegionModel"]
