"""What users call about the graphs of a cached model: to look at them, and to compile them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import ConfigError
from bwcache_compile.ir.graph_text import GraphDiff
from bwcache_compile.ir.pass_files import write_pass_files
from bwcache_compile.ir.plan import CachePlan
from bwcache_compile.ir.program import ModelProgram
from bwcache_compile.runtime.compilation import Compilation, uses_cuda_graphs
from bwcache_compile.runtime.programs import ProgramCache
from bwcache_compile.runtime.signature import Parameters
from bwcache_compile.runtime.trial import Toolchain


class GraphMethods:
    """The methods of a cached model about its graphs."""

    cache_config: CacheConfig
    _programs: ProgramCache
    _toolchain: Toolchain
    _call_parameters: Parameters

    @property
    def plan(self) -> CachePlan:
        """The plan of the program used last."""
        return self._programs.latest.plan

    @property
    def program(self) -> ModelProgram:
        """The program used last."""
        return self._programs.latest.program

    @property
    def cached_programs(self) -> tuple[ModelProgram, ...]:
        """Every program there is, one per signature."""
        return self._programs.all

    def graph_diff(self) -> dict[str, GraphDiff]:
        """Return what each pass changed, by its name, and what all did together, under "whole"."""
        return self._programs.explain(self.cache_config)

    def dump_passes(self, directory: str | Path) -> tuple[Path, ...]:
        """Write the graph before and after each pass, and their difference, as text: `01_canonicalize.before.txt` and so on.

        The passes run again on what was captured. A folder that holds an earlier dump is replaced.

        Returns:
            The files, in the order of the passes.

        Raises:
            ExportError: The folder holds something else, or cannot be written to. It is as it was.
            StateError: Nothing is captured yet.
        """
        return write_pass_files(self.graph_diff(), directory)

    def compile(self, **options: Any) -> None:
        """Compile each program's graphs whole with `torch.compile(**options)`, those captured later too.

        Inductor compiles blocks that are alike once. Operators of one block are then not fused with those of the next; a block that is
        like no other is compiled for itself, and the log says which and why. Other backends get graphs without calls.
        """
        self._programs.compile(Compilation(options))

    def compile_repeated_blocks(self, **options: Any) -> None:
        """Compile the blocks alone with `torch.compile(**options)`, those that are alike once; what is around them runs eagerly.

        Compiling takes as long for a model of any depth. A block that cannot be compiled for itself is warned of and runs eagerly.

        Raises:
            ConfigError: The guard is in the graph, or the options replay CUDA graphs.
        """
        if self._toolchain.guard == "graph":
            raise ConfigError('compile_repeated_blocks needs guard="host". Call compile(), which compiles whole graphs.')
        if uses_cuda_graphs(options):
            raise ConfigError(
                "compile_repeated_blocks does not replay CUDA graphs: each replay would copy the weights of its block. Call compile(),"
                " whose graphs hold them."
            )
        self._programs.compile(Compilation(options, regional=True))
