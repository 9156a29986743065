"""Room on the frame stack, counted in page faults: how deep the caller stands must not matter."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from typing import Any

import pytest

from bwcache_compile.runtime.frames import call_with_room

CALLS = 500


def operator(value: int) -> int:
    return value


def graph(value: int) -> int:
    """Make all calls from one depth, as a graph does."""
    for _ in range(CALLS):
        value = operator(value)
    return value


def worst(call: Callable[..., Any]) -> int:
    """Return the page faults of the graph at the worst of many depths."""

    def at_depth(depth: int) -> int:
        if depth == 0:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            call()
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        return at_depth(depth - 1)

    return max(at_depth(depth) for depth in range(300))


def test_no_depth_is_slow() -> None:
    assert call_with_room(graph, [3]) == 3
    assert worst(lambda: call_with_room(graph, [3])) < CALLS / 5


@pytest.mark.skipif(sys.version_info[:2] not in {(3, 11), (3, 12)}, reason="needs Python 3.11 or 3.12, whose stack keeps no spare chunk")
def test_some_depth_is_slow_without_room() -> None:
    assert worst(lambda: graph(3)) >= CALLS
