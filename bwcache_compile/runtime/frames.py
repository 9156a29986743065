"""Room on Python's frame stack for a graph, which calls thousands of operators from one depth.

CPython keeps frames in chunks. Where a chunk ends at just that depth, each call maps and unmaps the next one, and a step
takes up to twice as long; whether it happens hangs on how deep the caller stands. Seen with 3.11; interpreters released
since spring 2026 keep a spare chunk (https://github.com/python/cpython/issues/142183).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, TypeVar

import torch

from bwcache_compile.ir.torch_compat import get_eval_frame_callback, skip

# 512 KiB of slots: too many for what is left of any chunk, so a chunk of 1 MiB begins, half of it empty.
_SLOTS = 2**16


_Function = TypeVar("_Function", bound=Callable[..., Any])


def left_out(function: _Function) -> _Function:
    """Keep a compiler from the function's own frame, and not from what it calls.

    `torch.compiler.disable(recursive=False)` does so too, and raises while any thread of the process exports a model.
    """
    skip(function)
    return function


def hidden(function: _Function) -> _Function:
    """Keep a compiler from a function and from all that it calls; where none is at work, the call costs nothing more."""
    disabled: Callable[..., Any] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (disabled if get_eval_frame_callback() else function)(*args, **kwargs)

    return left_out(call)  # type: ignore[return-value]


@left_out
def call_directly(graph: Callable[..., Any], operands: Sequence[Any]) -> Any:
    """Call a graph. A compiler leaves the frame out and takes the graph."""
    return graph(*operands)


call_with_room: Callable[[Callable[..., Any], Sequence[Any]], Any] = left_out(
    FunctionType(call_directly.__code__.replace(co_stacksize=_SLOTS), globals(), "call_with_room")
)
"""Call a graph from a frame that has 512 KiB of unbroken stack behind it. A compiler leaves the frame out and takes the graph.

Making that room takes some 30 us, more than a graph of few operators could lose.
"""
