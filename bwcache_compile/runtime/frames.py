"""Limit an outer `torch.compile` to the graphs: the code that manages contexts and state is not compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from bwcache_compile.ir.torch_compat import get_eval_frame_callback, skip

_Function = TypeVar("_Function", bound=Callable[..., Any])


def left_out(function: _Function) -> _Function:
    """Make torch.compile skip the function's own frame, but not the functions that it calls.

    `torch.compiler.disable(recursive=False)` does so too, but raises while any thread of the process exports a model.
    """
    skip(function)
    return function


def hidden(function: _Function) -> _Function:
    """Make torch.compile skip a function and all that it calls; a call outside of compiled code costs nothing more."""
    disabled: Callable[..., Any] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (disabled if get_eval_frame_callback() else function)(*args, **kwargs)

    return left_out(call)  # type: ignore[return-value]


@left_out
def call_directly(graph: Callable[..., Any], operands: Sequence[Any]) -> Any:
    """Call a graph. torch.compile skips this frame and compiles the graph."""
    return graph(*operands)
