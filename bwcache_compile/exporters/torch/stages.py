"""Split a graph whose blocks are calls into stages: what stands before the blocks, each block, what stands between and behind them.

Stages hand tensors on, never numbers: each works sizes out anew, and takes an input of the model with it where no other tensor shows them.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from bwcache_compile.errors import ExportError
from bwcache_compile.exporters.graphs import keep_values, without_constants
from bwcache_compile.exporters.torch.package import dynamic_sizes
from bwcache_compile.exporters.torch.parts import Part, grouped, is_worked_out, written_elsewhere
from bwcache_compile.ir.dataflow import DataFlow
from bwcache_compile.ir.inline import inline_calls
from bwcache_compile.ir.outlined_block import BLOCK, OutlinedBlock
from bwcache_compile.ir.program import ModelProgram


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a graph that runs as one call.

    Attributes:
        block: Name of the block that it is; None for what stands around the blocks.
        graph: Over weights (`get_attr`) and inputs; it returns a tuple.
        weights: Names of the weights that it reads, each once, in the order of first use.
        inputs: Names of the values that it takes, in order.
        outputs: Names of the values that it returns, in order.
        key: Equal for stages that one package can stand for.
    """

    block: str | None
    graph: Graph
    weights: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    key: Hashable


@dataclasses.dataclass(frozen=True)
class Stages:
    """A graph as stages, in the order in which they run.

    Attributes:
        stages: Their values go by names: those of the graph's inputs, and one for each value that a stage returns.
        attributes: What `get_attr` nodes read, by name.
        inputs: Names of the graph's tensor inputs, in order.
        outputs: Names of the graph's outputs, in order.
        returned: Names of the values that these are.
    """

    stages: tuple[Stage, ...]
    attributes: dict[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    returned: tuple[str, ...]


def _refused(program: ModelProgram, reason: str) -> ExportError:
    return ExportError(
        f"the blocks of {program.model_name} cannot be compiled apart from the rest: {reason}.\n  Export with blocks_once=False, which"
        " compiles the graph into one package."
    )


class _Values:
    """The names of the values that stages hand to one another; a value has one, whichever nodes stand for it."""

    def __init__(self, inputs: Mapping[Node, str]) -> None:
        """Know the graph's inputs."""
        self._names: dict[Hashable, str] = {node: name for node, name in inputs.items()}
        self._taken = set(inputs.values())

    def _named(self, key: Hashable, name: str) -> str:
        if key not in self._names:
            while name in self._taken:
                name += "_"
            self._taken.add(name)
            self._names[key] = name
        return self._names[key]

    def result(self, call: Node, position: Any) -> str:
        """Return the name of what a block returns at a position."""
        return self._named((call, position), f"{call.name}_{position}")

    def name(self, node: Node) -> str:
        """Return the name of a value."""
        source = node.args[0] if node.target is operator.getitem else None
        if isinstance(source, Node) and source.op == "call_module":
            return self.result(source, node.args[1])
        return self._named(node, node.name)


class _Builder:
    """Makes a stage of a part: copies its operators to a graph of their own, where all that is outside is a weight or an input."""

    def __init__(self, program: ModelProgram, part: Part, values: _Values, attributes: Mapping[str, Any]) -> None:
        """Find the weights and the inputs."""
        self._program, self._part, self._values, self._attributes = program, part, values, attributes
        self._own = set(part.nodes)
        self._weights: dict[int, str] = {}
        self.inputs: dict[str, Node] = {}
        for node in part.nodes:
            for other in node.all_input_nodes:
                self._need(other)

    def _need(self, node: Node) -> None:
        node = self._part.given.get(node, node)
        if node in self._own:
            return
        if node.op == "get_attr":
            value = self._attributes[str(node.target)]
            if isinstance(value, Tensor):
                self._weights.setdefault(id(value), str(node.target))
        elif is_worked_out(node):
            for other in node.all_input_nodes:
                self._need(other)
        elif isinstance(node.meta.get("val"), Tensor):
            self.inputs.setdefault(self._values.name(node), node)
        else:
            raise _refused(self._program, f"`{node.name}` is no tensor, and goes from one part of the graph to another")

    def show_sizes(self, sources: Mapping[str, Node]) -> None:
        """Take the inputs of the model that show dynamic sizes which no other input shows as they are.

        Inputs of the model come first: a compiler reads sizes in this order, and from products of sizes only what it knows by then.

        Args:
            sources: The input that each dynamic size is read from.
        """
        tensors = [node.meta["val"] for node in self.inputs.values()]
        shown = {str(size) for tensor in tensors for size in tensor.shape}
        found = dynamic_sizes([*(node.meta.get("val") for node in self._part.nodes), *tensors])[1]
        carriers = {}
        for name in map(str, found):
            node = sources.get(name)
            if node is not None and (name not in shown or self._values.name(node) in self.inputs):
                carriers[self._values.name(node)] = node
        self.inputs = {**carriers, **self.inputs}

    def build(self, read: Collection[str]) -> Stage:
        """Return the stage.

        Args:
            read: Names of the values that others read; a block returns all of its own, since those like it do.
        """
        graph, copies, part = Graph(), dict[Node, Node](), self._part
        for node in self.inputs.values():
            copies[node] = graph.placeholder(node.name)
            copies[node].meta = dict(node.meta)
        by_name = {self._values.name(node): copies[node] for node in self.inputs.values()}

        def operand(node: Node) -> Node:
            node = part.given.get(node, node)
            if node not in copies:
                if node.op == "get_attr" or is_worked_out(node):
                    copy(node)
                else:
                    copies[node] = by_name[self._values.name(node)]
            return copies[node]

        def copy(node: Node) -> None:
            operands = {other: operand(other) for other in node.all_input_nodes}  # what they need is put into the graph first
            copies[node] = graph.node_copy(node, operands.__getitem__)

        for node in part.nodes:
            copy(node)
        if part.call is not None:
            names = [self._values.name(node) for node in part.returned[len(part.results) :]]
            names = [*(self._values.result(part.call, i) for i in part.results), *names]
            returned = dict(zip(names, part.returned, strict=True))
        else:
            returned = {name: node for node in part.nodes if (name := self._values.name(node)) in read}
        graph.output(tuple(copies[node] for node in returned.values()))
        block = None if part.call is None else part.call.meta[BLOCK]
        key = _key(graph, self._attributes)
        return Stage(block, graph, tuple(self._weights.values()), tuple(self.inputs), tuple(returned), key)


def _key(graph: Graph, attributes: Mapping[str, Any]) -> Hashable:
    """Describe a graph without names: operators, constants, and what is compiled in of each operand."""
    places: dict[Hashable, int] = {}

    def plain(argument: Any) -> Hashable:
        if isinstance(argument, Node):
            return "node", places[argument]
        if isinstance(argument, (list, tuple)):
            return tuple(plain(item) for item in argument)
        return type(argument).__name__, str(argument)

    def described(value: Any) -> Hashable:
        if not isinstance(value, Tensor):
            return id(value)
        strides = tuple(map(str, value.stride())) if value.layout is torch.strided else ()
        return tuple(map(str, value.shape)), strides, value.dtype, value.device, value.layout

    code: list[Hashable] = []
    for node in graph.nodes:
        if node.op == "get_attr":
            value = attributes[str(node.target)]
            places[node] = places.setdefault(id(value), len(places))  # one weight, however often it is read
            code.append((places[node], described(value)))
        elif node.op == "placeholder":
            places[node] = len(places)
            code.append((places[node], described(node.meta["val"])))
        else:
            code.append((node.target, plain(node.args), plain(tuple(node.kwargs.items()))))
            places[node] = len(places)
    return tuple(code)


def split_blocks(program: ModelProgram) -> Stages:
    """Split the compute graph of a program whose blocks are calls (`outline_blocks`) into stages.

    Run one after another, the stages compute what the graph does. Each block is a stage.

    Raises:
        ExportError: One part writes to what another made, or something that is no tensor and follows from no size is read in several.
    """
    io = program.io("compute")
    flat = inline_calls(program.compute, lambda inner: isinstance(inner, OutlinedBlock))
    module = GraphModule(flat.attributes, flat.graph)
    graph = module.graph
    placeholders, sizes = graph.find_nodes(op="placeholder"), program.signature.sizes
    sources = {symbol.name: placeholders[symbol.position] for symbol in (sizes.symbols if sizes else ())}
    inputs, outputs = without_constants(graph, io.inputs), keep_values(graph, io)
    values = _Values(dict(zip(graph.find_nodes(op="placeholder"), inputs, strict=True)))
    flow = DataFlow(graph)
    parts = grouped(module, flow)
    written = written_elsewhere(parts, flow)
    if written is not None:
        raise _refused(program, f"`{written}` is made in one part of the graph and written to in another")
    returned: Any = graph.output_node().args[0]
    if any(node.op == "get_attr" or is_worked_out(node) for node in returned):
        raise _refused(program, "the graph returns a weight or a size as it is")
    results = tuple(map(values.name, returned))
    builders = [_Builder(program, part, values, flat.attributes) for part in parts]
    for builder in builders:
        builder.show_sizes(sources)
    read = {*results, *(name for builder in builders for name in builder.inputs)}
    stages = tuple(stage for stage in (builder.build(read) for builder in builders) if stage.outputs)
    return Stages(stages, flat.attributes, inputs, outputs, results)
