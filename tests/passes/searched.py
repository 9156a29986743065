"""What the tests of the search for blocks ask of a model's graph."""

from __future__ import annotations

import dataclasses
import functools

from torch.fx import Graph, Node

from bwcache_compile.ir.dataflow import DataFlow
from bwcache_compile.passes import canonicalize
from bwcache_compile.passes.block_search.stacks import Stack, Unit, named_stacks, streams
from tests.models import Growing, OddMiddle, OneStream, Refined, Tiny, TwoStream, captured

MODELS: dict[str, type[Tiny]] = {model.__name__: model for model in (OneStream, OddMiddle, Growing, TwoStream, Refined)}


@dataclasses.dataclass(frozen=True)
class Searched:
    """A model's graph, before anything is looked for."""

    graph: Graph
    flow: DataFlow
    streams: set[Node]

    @property
    def stacks(self) -> dict[str, Stack]:
        """Candidates by name."""
        return {stack.name: stack for stack in named_stacks(self.graph)}

    def units(self, name: str = "blocks") -> tuple[Unit, ...]:
        """Return the repetitions of a candidate."""
        return self.stacks[name].units

    def input(self, name: str) -> Node:
        """Return one of the model's inputs."""
        return next(node for node in self.graph.find_nodes(op="placeholder") if node.name == name)


@functools.cache
def searched(model: str) -> Searched:
    """Capture one of `MODELS`; the tests edit no graph."""
    program = canonicalize(captured(MODELS[model]())).program
    graph = program.compute.graph
    return Searched(graph, DataFlow(graph), streams(graph, 3))
