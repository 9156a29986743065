"""Caching in diffusers pipelines: every transformer of a pipeline at once, and the arguments of a call."""

from bwcache_compile.pipelines.captured_call import CapturedCall, capture_call
from bwcache_compile.pipelines.enabling import disable, enable

__all__ = ["CapturedCall", "capture_call", "disable", "enable"]
