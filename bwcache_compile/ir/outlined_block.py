"""The graph that blocks which are alike share."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule

BLOCK = "bwcache_block"
"""Key in the `meta` of a call of an `OutlinedBlock`: the name of the block that it stands for."""


class OutlinedBlock(GraphModule):
    """A graph that `torch.compile` compiles once, however often it is called; elsewhere it is a graph like any other."""

    def recompile(self) -> Any:
        """Write the graph out as Python, and mark that as a region to compile once."""
        code = super().recompile()
        kind: Any = type(self)  # every graph module has a class of its own
        kind.forward = torch.compiler.nested_compile_region(kind.forward)
        return code
