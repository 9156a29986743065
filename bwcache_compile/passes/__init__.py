"""Analyses and transforms, one per file, and the pipeline that runs them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal

from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import warn
from bwcache_compile.ir.graph_text import GraphDiff, graph_diff, snapshot
from bwcache_compile.ir.program import ModelProgram, PassResult, graph_module_copy
from bwcache_compile.ir.ranks import Ranks
from bwcache_compile.ir.verify import verify
from bwcache_compile.passes.arrange_sources import arrange_sources
from bwcache_compile.passes.canonicalize import canonicalize
from bwcache_compile.passes.find_blocks import find_blocks
from bwcache_compile.passes.hoist_sizes import hoist_sizes
from bwcache_compile.passes.insert_cache import insert_cache
from bwcache_compile.passes.insert_cond import insert_cond
from bwcache_compile.passes.insert_indicator import insert_indicator
from bwcache_compile.passes.insert_policy import insert_policy
from bwcache_compile.passes.lift_cache_state import lift_cache_state
from bwcache_compile.passes.outline_blocks import outline_blocks
from bwcache_compile.passes.plan_cache import plan_cache
from bwcache_compile.passes.specialize import specialize
from bwcache_compile.passes.split_region import split_region

LOGGER = logging.getLogger(__name__)

Pass = Callable[[ModelProgram], PassResult]
Guard = Literal["host", "graph"]
"""Who decides at each step: the caller, between two graphs, or one graph by itself."""
AfterPass = Callable[[str, ModelProgram], None]

TIDY_PIPELINE: tuple[Pass, ...] = (canonicalize, hoist_sizes)
CACHE_PIPELINE: tuple[Pass, ...] = (
    arrange_sources,
    split_region,
    insert_cache,
    insert_indicator,
    insert_policy,
    lift_cache_state,
    specialize,
)
GUARD_PIPELINE: tuple[Pass, ...] = (
    arrange_sources,
    split_region,
    insert_cache,
    insert_indicator,
    insert_policy,
    lift_cache_state,
    insert_cond,
)

__all__ = [
    "CACHE_PIPELINE",
    "TIDY_PIPELINE",
    "build",
    "canonicalize",
    "explain",
    "find_blocks",
    "outlined",
    "outlined_copy",
    "plan_cache",
    "run_pipeline",
]


def run_pipeline(program: ModelProgram, passes: tuple[Pass, ...], after_pass: AfterPass | None = None) -> ModelProgram:
    """Run passes in order, verifying after each.

    Args:
        program: Consumed: its graphs are edited in place.
        passes: Plain functions.
        after_pass: Called with the pass's name and the program after it: for printing, timing and diffs.

    Raises:
        InvariantError: A pass broke a rule.
    """
    program = _edited(program, passes, after_pass)
    program.compute.recompile()  # once: writing a graph out as Python costs more than most passes
    return program


def _edited(program: ModelProgram, passes: tuple[Pass, ...], after_pass: AfterPass | None) -> ModelProgram:
    """Run passes; the graph is not fit to run afterwards."""
    for transform in passes:
        program = transform(program).program
        verify(program, transform.__name__)
        if after_pass:
            after_pass(transform.__name__, program)
    return program


def build(
    program: ModelProgram,
    config: CacheConfig,
    after_pass: AfterPass | None = None,
    blocks: Sequence[str] = (),
    guard: Guard = "host",
    ranks: Ranks | None = None,
) -> ModelProgram:
    """Turn a captured program into its cached form: find the blocks, plan, rewrite.

    Args:
        program: Consumed.
        config: What to cache and when to reuse it.
        after_pass: See `run_pipeline`.
        blocks: Names of the blocks to cache instead of those that are found; see `find_blocks`.
        guard: "host" makes the `compute` and `reuse` graphs, "graph" the `guarded` one.
        ranks: Those that run the model together and decide alike; None for one process.

    Raises:
        NoBlocksFoundError: There is nothing to cache.
        ConfigError: The settings do not fit the model.
        UnsupportedGraphError: A cached step could not reproduce what the graph does.
    """
    program = _edited(program, TIDY_PIPELINE, after_pass)
    program = program.replace(plan=plan_cache(program, find_blocks(program, blocks), config, ranks))
    return run_pipeline(program, CACHE_PIPELINE if guard == "host" else GUARD_PIPELINE, after_pass)


def outlined_copy(program: ModelProgram, regional: bool = False) -> PassResult:
    """Run `outline_blocks` on a copy of a finished program, and verify it."""
    made = outline_blocks(program.replace(compute=graph_module_copy(program.compute)), regional)
    verify(made.program, outline_blocks.__name__)
    return made


def outlined(program: ModelProgram, regional: bool = False) -> ModelProgram:
    """Return a finished program whose blocks are calls of the graphs that they share; the program itself stays as it is.

    Args:
        program: With the guard outside of its graphs.
        regional: See `outline_blocks`. A block that is no call runs eagerly then, which is warned of.
    """
    made = outlined_copy(program, regional)
    for name, reason in made.left.items():
        if regional:
            warn(f"{name} of {program.model_name} is not compiled, since {reason}. It runs eagerly; compile() compiles it.")
        else:
            LOGGER.info("%s of %s is compiled for itself: %s", name, program.model_name, reason)
    return made.program


def explain(
    program: ModelProgram, config: CacheConfig, blocks: Sequence[str] = (), guard: Guard = "host", ranks: Ranks | None = None
) -> dict[str, GraphDiff]:
    """Build a captured program pass by pass and return what each changed, by name, and all together as "whole".

    `specialize` and "whole" compare with the graph of a reused step: what is missing there is what reuse saves. With the
    guard in the graph they compare with the guarded one.
    """
    diffs: dict[str, GraphDiff] = {}
    first = latest = snapshot(program.compute)

    def record(name: str, after: ModelProgram) -> None:
        nonlocal latest
        now = snapshot(after.reuse or after.guarded or after.compute)
        diffs[name] = graph_diff(latest, now, name)
        latest = now

    plan = build(program, config, record, blocks, guard, ranks).planned()
    diffs["whole"] = graph_diff(first, latest, "whole", blocks=len(plan.blocks))
    return diffs
