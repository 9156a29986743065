"""Assertions for tests of cached models: graph diffs, blocks, outputs, and whether an export still has its cache.

Needs torch; `assert_cached` needs onnx-ir for ONNX, and accepting a graph diff needs expecttest. The pytest fixture is in
`bwcache_compile.testing.fixtures`.
"""

from __future__ import annotations

from bwcache_compile.testing.blocks import assert_blocks
from bwcache_compile.testing.exported import assert_cached
from bwcache_compile.testing.graphs import assert_graph_diff
from bwcache_compile.testing.outputs import assert_same_outputs

__all__ = ["assert_blocks", "assert_cached", "assert_graph_diff", "assert_same_outputs"]
