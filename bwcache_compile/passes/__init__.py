"""Analyses and transforms, one per file, and the pipeline that runs them."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import GraphModule

from bwcache_compile.config import CacheConfig
from bwcache_compile.graph_text import format_graph
from bwcache_compile.passes.canonicalize import canonicalize
from bwcache_compile.passes.find_blocks import find_blocks
from bwcache_compile.passes.insert_cache import insert_cache
from bwcache_compile.passes.insert_indicator import insert_indicator
from bwcache_compile.passes.insert_policy import insert_policy
from bwcache_compile.passes.lift_cache_state import lift_cache_state
from bwcache_compile.passes.plan_cache import plan_cache
from bwcache_compile.passes.specialize import specialize
from bwcache_compile.passes.split_region import split_region
from bwcache_compile.program import BlockSearch, CachedProgram, PassResult
from bwcache_compile.verify import verify

Pass = Callable[[CachedProgram], PassResult]
AfterPass = Callable[[str, CachedProgram, str, str], None]

CACHE_PIPELINE: tuple[Pass, ...] = (split_region, insert_cache, insert_indicator, insert_policy, lift_cache_state, specialize)

__all__ = ["CACHE_PIPELINE", "build", "canonicalize", "find_blocks", "plan_cache", "run_pipeline"]


def run_pipeline(program: CachedProgram, passes: tuple[Pass, ...], after_pass: AfterPass | None = None) -> CachedProgram:
    """Run passes in order, verifying after each.

    Args:
        program: Consumed: its graphs are edited in place.
        passes: Plain functions.
        after_pass: Called with the pass's name, the program, and its compute graph printed before and after; where it
            is not given nothing is printed.

    Raises:
        InvariantError: A pass broke a rule.
    """
    for transform in passes:
        before = format_graph(program.compute) if after_pass else ""
        result = transform(program)
        program = result.program
        for module in (program.compute, program.reuse):
            if isinstance(module, GraphModule):
                module.recompile()
        verify(program, transform.__name__)
        if after_pass:
            after_pass(transform.__name__, program, before, format_graph(program.compute))
    return program


def build(program: CachedProgram, config: CacheConfig, after_pass: AfterPass | None = None) -> tuple[CachedProgram, BlockSearch]:
    """Turn a captured program into its cached form: find the blocks, plan, rewrite.

    Raises:
        NoBlocksFoundError: There is nothing to cache.
        ConfigError: The settings do not fit the model.
        UnsupportedGraphError: A cached step could not reproduce what the graph does.
    """
    program = run_pipeline(program, (canonicalize,), after_pass)
    search = find_blocks(program)
    program = program.replace(plan=plan_cache(program, search, config))
    return run_pipeline(program, CACHE_PIPELINE, after_pass), search
