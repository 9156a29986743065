"""Compare the blocks that are found in a model with what a test says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from bwcache_compile import passes
from bwcache_compile.api import find_blocks
from bwcache_compile.errors import ConfigError
from bwcache_compile.ir.plan import BlockSearch, Rejection
from bwcache_compile.runtime import CachedModel


def _search(model: nn.Module | ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> BlockSearch:
    if not isinstance(model, CachedModel):
        return find_blocks(model, example_args=args, example_kwargs=kwargs)
    if args or kwargs:
        model.prepare(args, kwargs)
    return passes.find_blocks(passes.run_pipeline(model.program.fresh(), passes.TIDY_PIPELINE))


def _common(one: str, other: str) -> int:
    """Count the leading parts that two module paths share."""
    count = 0
    for a, b in zip(one.split("."), other.split("."), strict=False):
        if a != b:
            break
        count += 1
    return count


def _nearest(rejections: Sequence[Rejection], names: Sequence[str]) -> Rejection | None:
    """Return the rejected candidate whose path is nearest to what is missing, else the largest."""

    def score(rejection: Rejection) -> tuple[int, int]:
        return max((_common(rejection.stack, name) for name in names), default=0), rejection.count

    return max(rejections, key=score, default=None)


def assert_blocks(
    model: nn.Module | ExportedProgram,
    expected: Sequence[str],
    *,
    example_args: tuple[Any, ...] = (),
    example_kwargs: dict[str, Any] | None = None,
) -> None:
    """Check which repeated blocks are found in a model, and in which order.

    Args:
        model: In evaluation mode; or an exported program or a cached model that is captured, which need no examples.
        expected: Module paths in the order in which the blocks run; empty if none is to be found.
        example_args: Positional arguments to capture with.
        example_kwargs: Keyword arguments to capture with.

    Raises:
        AssertionError: Others are found, or in another order. The message names the missing ones, the extra ones, and the rejected
            candidate that is nearest to what is missing, with its reason.
        CaptureError: The model could not be captured.
    """
    __tracebackhide__ = True
    if isinstance(expected, str):
        raise ConfigError(f"expected must be a list of module paths, got {expected!r}.")
    search = _search(model, example_args, example_kwargs)
    found, wanted = [block.name for block in search.blocks], list(expected)
    if found == wanted:
        return
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    lines = [f"expected {len(wanted)} blocks, found {len(found)}:" if missing or extra else "the blocks run in another order:"]
    lines += [f"  missing: {', '.join(missing)}"] if missing else []
    lines += [f"  extra: {', '.join(extra)}"] if extra else []
    lines += [] if missing or extra else [f"  expected: {', '.join(wanted)}"]
    lines += [f"  found: {', '.join(found) or 'none'}"]
    nearest = _nearest(search.rejections, missing)
    if missing and nearest is not None:
        lines.append(f"  nearest rejected candidate: {nearest.stack} ({nearest.count} modules): {nearest.reason}")
    raise AssertionError("\n".join(lines))
