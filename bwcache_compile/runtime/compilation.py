"""How the graphs of a program are compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from bwcache_compile.ir.outlined_block import OutlinedBlock
from bwcache_compile.runtime.eager import eager_function

Graph = Callable[..., Any]


def uses_cuda_graphs(options: Mapping[str, Any]) -> bool:
    """Whether `torch.compile` with these options replays CUDA graphs."""
    mode, chosen = options.get("mode"), options.get("options") or {}
    backend = options.get("backend", "inductor")
    if backend != "inductor":
        return backend == "cudagraphs"
    return mode in ("reduce-overhead", "max-autotune") or bool(chosen.get("triton.cudagraphs"))


def owned(values: Sequence[Any], ours: Sequence[Tensor]) -> list[Any]:
    """Copy tensors that a CUDA graph returned, which its next replay overwrites; what lies in our own memory is kept as it is."""
    places = {tensor.data_ptr() for tensor in ours} - {0}  # of tensors that wrap others
    return [value.clone() if isinstance(value, Tensor) and value.data_ptr() not in places else value for value in values]


class _NoViews(nn.Module):
    """Calls a module with aliases instead of views.

    With dynamic sizes a compiled function is good for views of bases of the same rank only. One block takes a view where the next takes
    none, and would be compiled once more for that.
    """

    def __init__(self, inner: nn.Module) -> None:
        """Wrap a module."""
        super().__init__()
        self._inner = inner

    def forward(self, *operands: Any) -> Any:
        """Call it."""
        return self._inner(*(x.data if isinstance(x, Tensor) and x._base is not None else x for x in operands))


@dataclasses.dataclass(frozen=True)
class Compilation:
    """How the graphs of every program of a model are compiled.

    Attributes:
        options: Of `torch.compile`.
        regional: Compile the blocks alone, each kind once, and run what is around them eagerly.
    """

    options: Mapping[str, Any]
    regional: bool = False

    @property
    def outlines(self) -> bool:
        """Whether blocks that are alike are calls of one graph. Backends other than Inductor may not know such calls."""
        return self.regional or self.options.get("backend", "inductor") == "inductor"

    def compiled(self, modules: Mapping[str, GraphModule], eager: Mapping[str, Graph], dynamic: bool) -> dict[str, Graph]:
        """Return the functions that run graphs, each of which is compiled at its first run.

        Args:
            modules: The graphs, by kind, outlined if this says so.
            eager: The same as functions that run them as they are.
            dynamic: Whether they have dynamic sizes.
        """
        options = {"dynamic": True, **self.options} if dynamic else dict(self.options)
        if not self.regional:
            return {kind: torch.compile(module, **options) for kind, module in modules.items()}
        functions = dict(eager)
        for kind, module in modules.items():
            # each as a graph of its own, since it is no region of another one
            blocks: dict[GraphModule, Any] = {
                inner: torch.compile(GraphModule(inner, inner.graph), **options)
                for inner in module.modules()
                if isinstance(inner, OutlinedBlock)
            }
            if dynamic:
                blocks = {inner: _NoViews(compiled) for inner, compiled in blocks.items()}
            if blocks:  # the graph of a reused step has none
                functions[kind] = eager_function(module, blocks)
        return functions
