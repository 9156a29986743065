"""Turn a program's graphs into exported programs of plain operators, each of which says whether it belongs to the region."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import SymInt, Tensor, nn
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputKind, OutputSpec, TensorArgument
from torch.fx import Graph, GraphModule, Node

from bwcache_compile.graph_io import GraphIO
from bwcache_compile.ir.inline import inline_calls
from bwcache_compile.ir.program import REGION_MARK, ModelProgram, graph_module_copy
from bwcache_compile.ir.torch_compat import FakeTensor, FakeTensorMode, ShapeEnv, load_verifier, pytree
from bwcache_compile.ir.tracing import tracing


@dataclasses.dataclass(frozen=True)
class PlainGraph:
    """One graph on its way to a file.

    Attributes:
        kind: `compute`, `reuse` or `guarded`.
        exported: The graph over lifted weights. Each operator's `meta["custom"]` names the node it was and says whether
            that belongs to the region.
        inputs: Names of its tensor inputs for the outside, in order.
        outputs: Names of its outputs for the outside, in order.
    """

    kind: str
    exported: ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def under_autocast(program: ModelProgram) -> contextlib.ExitStack:
    """Enter the autocast that a program was captured under, if any."""
    stack = contextlib.ExitStack()
    for device, dtype in program.signature.autocast:
        stack.enter_context(torch.autocast(device, dtype))
    return stack


def _one_mode(module: GraphModule) -> FakeTensorMode:
    """Return the FakeTensorMode of the graph's dynamic sizes, also of those that depend on values; a new one if it has none."""
    for node in module.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, FakeTensor) and any(isinstance(size, SymInt) for size in value.shape):
                mode = value.fake_mode
                assert mode.shape_env is not None
                mode.shape_env.pending_fresh_unbacked_symbols.clear()  # an earlier export left some, and torch would stop at them
                return mode
    return FakeTensorMode(shape_env=ShapeEnv())


def _in_one_mode(module: GraphModule, mode: FakeTensorMode) -> None:
    """Make the example value of every node anew in one mode: the exporter does not accept a graph with several."""

    def described(value: Tensor) -> Tensor:
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)

    for inner in module.modules():
        for node in inner.graph.nodes if isinstance(inner, GraphModule) else ():
            if "val" in node.meta:
                node.meta["val"] = pytree.tree_map_only(Tensor, described, node.meta["val"])


def module_path(node: Node) -> str:
    """Return the path of the module that an operator was called in; empty outside of all."""
    calls = list((node.meta.get("nn_module_stack") or {}).values())
    return str(calls[-1][0]) if calls else ""


def _marked(module: GraphModule) -> None:
    """Record on each operator where it came from, in the one field of `meta` that decompositions preserve."""
    for inner in module.modules():
        for node in inner.graph.nodes if isinstance(inner, GraphModule) else ():
            if node.op == "call_function":
                marked = bool(node.meta.get(REGION_MARK))
                node.meta["custom"] = {"bwcache_node": node.name, "bwcache_module": module_path(node), REGION_MARK: marked}


def _own(module: GraphModule) -> GraphModule:
    """Give a graph copies of the graphs that it runs: the program's own stay as they are."""
    for node in module.graph.find_nodes(op="get_attr"):
        inner = getattr(module, str(node.target))
        if isinstance(inner, GraphModule):
            setattr(module, str(node.target), _own(graph_module_copy(inner)))
    return module


def _lifted(attributes: dict[str, Any], source: Graph) -> tuple[GraphModule, list[InputSpec], dict[str, Any], dict[str, Any]]:
    """Copy a graph with each weight as an input, weights first."""
    graph, copies = Graph(), {}
    specs: list[InputSpec] = []
    parameters: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    modules: dict[str, Any] = {}
    by_identity: dict[int, Node] = {}
    for node in source.find_nodes(op="get_attr"):
        name = str(node.target)
        value = attributes[name] if name in attributes else operator.attrgetter(name)(attributes)
        if not isinstance(value, Tensor):
            modules[name] = value
            continue
        if id(value) in by_identity:
            copies[node] = by_identity[id(value)]
            continue
        is_parameter = isinstance(value, nn.Parameter)
        placeholder = graph.placeholder(("p_" if is_parameter else "c_") + name.replace(".", "_"))
        placeholder.target = placeholder.name
        placeholder.meta["val"] = value
        copies[node] = by_identity[id(value)] = placeholder
        (parameters if is_parameter else constants)[name] = value
        kind = InputKind.PARAMETER if is_parameter else InputKind.CONSTANT_TENSOR
        specs.append(InputSpec(kind, TensorArgument(placeholder.name), name))
    for node in source.find_nodes(op="placeholder"):
        copies[node] = graph.node_copy(node)
        specs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(copies[node].name), None))
    graph.output(graph.graph_copy(source, copies))
    module = _own(GraphModule(modules, graph))
    _in_one_mode(module, _one_mode(module))
    return module, specs, parameters, constants


def exported_program(
    module: GraphModule, signature: ExportGraphSignature, ranges: dict[Any, Any], parameters: dict[str, Any], constants: dict[str, Any]
) -> ExportedProgram:
    """Wrap a graph over lifted weights as what torch's exporters take: called with its user inputs, it returns a tuple."""
    users = sum(spec.kind == InputKind.USER_INPUT for spec in signature.input_specs)
    in_spec = pytree.tree_structure((tuple(range(users)), {}))
    out_spec = pytree.tree_structure(tuple(range(len(signature.output_specs))))
    call = ModuleCallSignature(inputs=[], outputs=[], in_spec=in_spec, out_spec=out_spec)
    return ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=signature,
        state_dict=parameters,
        range_constraints=ranges,
        module_call_graph=[ModuleCallEntry("", call)],
        constants=constants,
        verifiers=[load_verifier("TRAINING")],  # blocks may write in place
    )


def without_constants(graph: Graph, names: Sequence[str]) -> tuple[str, ...]:
    """Remove a graph's inputs that are no tensors, whose values are built in; return the names of the others."""
    kept = []
    for node, name in zip(graph.find_nodes(op="placeholder"), names, strict=True):
        if isinstance(node.meta.get("val"), Tensor):
            kept.append(name)
        else:
            graph.erase_node(node)
    return tuple(kept)


def exported_graph(program: ModelProgram, attributes: dict[str, Any], graph: Graph) -> ExportedProgram:
    """Wrap a graph without calls, which returns a tuple of values, as an exported program with its weights lifted.

    Nothing is traced again, unless the program was captured under autocast, whose casts are written out.

    Args:
        program: Says under which autocast it was captured.
        attributes: What the graph's `get_attr` nodes read, by name.
        graph: It stays as it is.
    """
    lifted, specs, parameters, constants = _lifted(attributes, graph)
    _marked(lifted)
    output_specs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in _returned(lifted.graph)]
    exported = exported_program(lifted, ExportGraphSignature(specs, output_specs), {}, parameters, constants)
    if program.signature.autocast:
        with tracing(), under_autocast(program):
            exported = exported.run_decompositions({})  # traces it, so that casts stand in the graph
    return exported


def _returned(graph: Graph) -> tuple[Any, ...]:
    returned = graph.output_node().args[0]
    assert isinstance(returned, (list, tuple))
    return tuple(returned)


def keep_values(graph: Graph, io: GraphIO) -> tuple[str, ...]:
    """Let a graph return only what it computes; return the names of that. What is constant is built in elsewhere."""
    outputs = {name: node for name, node in io.unpack(_returned(graph)).items() if isinstance(node, Node)}
    graph.output_node().args = (tuple(outputs.values()),)
    return tuple(outputs)


def plain_graph(program: ModelProgram, kind: str) -> PlainGraph:
    """Return one of a program's graphs, its calls written out, its weights lifted."""
    io, flat = program.io(kind), inline_calls(getattr(program, kind))
    inputs, outputs = without_constants(flat.graph, io.inputs), keep_values(flat.graph, io)
    return PlainGraph(kind, exported_graph(program, flat.attributes, flat.graph), inputs, outputs)
