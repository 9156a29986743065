"""Which frames an outer `torch.compile` compiles: the graphs alone, never the code that keeps contexts and state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from bwcache_compile.ir.torch_compat import get_eval_frame_callback, skip

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
