"""The graphs of a program, compiled where asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule

from bwcache_compile.ir.program import ModelProgram
from bwcache_compile.ir.torch_compat import get_eval_frame_callback, inductor_compiles
from bwcache_compile.runtime.compilation import Compilation, uses_cuda_graphs
from bwcache_compile.runtime.eager import eager_function
from bwcache_compile.runtime.frames import hidden, left_out

Outline = Callable[[ModelProgram, bool], ModelProgram]
"""A cached program, and whether its blocks are to be compiled alone, to one whose blocks are calls of the graphs that they share."""


class RunnableGraphs:
    """What runs the graphs of a program.

    Attributes:
        program: The program.
        plan: Its plan.
        guarded: Whether the guard is in the graph.
        modules: By kind: `compute` and `reuse`, or `guarded` alone where the guard is in the graph.
        eager: The same as functions, to be run as they are.
        graphs: The same again, compiled where asked for.
    """

    def __init__(self, program: ModelProgram, outline: Outline | None = None) -> None:
        """Compile nothing yet; `outline` makes of a program what a compiler gets that compiles blocks that are alike once."""
        self.program, self.plan = program, program.planned()
        self.guarded = program.guarded is not None
        kinds = ("guarded",) if self.guarded else ("compute", "reuse")
        self.modules: dict[str, GraphModule] = {kind: getattr(program, kind) for kind in kinds}
        self.eager: dict[str, Callable[..., Any]] = {
            kind: module.forward if self.guarded else eager_function(module) for kind, module in self.modules.items()
        }
        self.graphs = dict(self.eager)
        self._compilation: Compilation | None = None
        self._outline = None if self.guarded else outline
        self._outlined: dict[str, GraphModule] | None = None

    def compile(self, compilation: Compilation) -> None:
        """Compile the graphs, each at its first run."""
        self._compilation = compilation
        modules = self._outlined_modules(compilation.regional) if compilation.outlines else self.modules
        self.graphs = compilation.compiled(modules, self.eager, self.program.signature.sizes is not None)

    @left_out
    def graph(self, kind: str) -> Callable[..., Any]:
        """Return what runs a graph. An outer `torch.compile` gets the module's code, whose weights it finds on the module."""
        if get_eval_frame_callback() and self._compilation is None:
            return self._for_outer(kind, inductor_compiles())
        return self.graphs[kind]

    @hidden
    def _for_outer(self, kind: str, inductor: bool) -> Callable[..., Any]:
        """Return what an outer `torch.compile` compiles; see `Compilation.outlines`."""
        if not inductor:
            return self.modules[kind].forward
        if self._outlined is None:
            self._outlined = self._outlined_modules(regional=False)
        return self._outlined[kind].forward

    def _outlined_modules(self, regional: bool) -> dict[str, GraphModule]:
        """Return the graphs with blocks that are calls of what they share, or as they are where nothing outlines them."""
        if self._outline is None:
            return self.modules
        outlined = self._outline(self.program, regional)
        return {kind: getattr(outlined, kind) for kind in self.modules}

    @left_out
    def replays(self) -> bool:
        """Whether what a graph returns now may be overwritten by its next run, since a CUDA graph is replayed.

        An outer `torch.compile` may do so and does not say: it counts as if it does.
        """
        if self.plan.device.type != "cuda":
            return False
        if self._compilation is not None:
            return uses_cuda_graphs(self._compilation.options)
        return bool(get_eval_frame_callback())
