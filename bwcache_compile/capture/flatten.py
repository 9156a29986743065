"""Turn a program that torch.export made into a flat graph over the model's own weights."""

from __future__ import annotations

import operator
from typing import Any

from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Interpreter

from bwcache_compile.ir.call_signature import Signature
from bwcache_compile.ir.dataflow import writes_escape
from bwcache_compile.ir.examples import keep_examples
from bwcache_compile.ir.program import Captured, ModelProgram
from bwcache_compile.ir.sizes import open_sizes
from bwcache_compile.ir.torch_compat import HigherOrderOperator, pytree
from bwcache_compile.ir.tracing import tracing


def _unlifted(exported: ExportedProgram) -> Captured:
    """Return the graph of an exported program with each weight read by a `get_attr` node instead of passed in.

    `ExportedProgram.module()` does this too, and is used if the model writes to its inputs or buffers. Otherwise it is
    only slow: it generates the Python code of the graph several times.
    """
    signature = exported.graph_signature
    kinds = {spec.kind for spec in signature.input_specs}
    plain = {InputKind.USER_INPUT, InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}
    graph = Graph()
    if not kinds <= plain or signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        root: Any = exported.module(check_guards=False)
        returned: Any = graph.graph_copy(root.graph, {})
        tensors = {}
    else:
        root, tensors, copies = exported.graph_module, {**exported.constants, **exported.state_dict}, {}
        for spec, node in zip(signature.input_specs, exported.graph.find_nodes(op="placeholder"), strict=True):
            if spec.kind != InputKind.USER_INPUT:
                copies[node] = graph.get_attr(str(spec.target))
                copies[node].meta["val"] = node.meta["val"]
        returned = graph.graph_copy(exported.graph, copies)
    graph.output(tuple(returned) if isinstance(returned, (list, tuple)) else (returned,))
    names = [str(node.target) for node in graph.find_nodes(op="get_attr")]
    return Captured(graph, {name: tensors[name] if name in tensors else operator.attrgetter(name)(root) for name in names})


def _runs_under_modes(module: GraphModule) -> bool:
    """Whether a graph runs others under autocast or another gradient mode: the block search does not look into such graphs."""
    return any(isinstance(node.target, HigherOrderOperator) and "wrap_with" in str(node.target) for node in module.graph.nodes)


def _functional(exported: ExportedProgram) -> ExportedProgram:
    """Return a program in functional form, with the graphs that run under a mode inlined: autocast becomes casts."""
    nested = [m for m in exported.graph_module.modules() if isinstance(m, GraphModule) and m is not exported.graph_module]
    for module in nested:
        vars(module)["forward"] = Interpreter(module).run  # node by node, so that each operator says which module it ran in
    try:
        return exported.run_decompositions({})
    finally:
        for module in nested:
            del vars(module)["forward"]


def flat_program(exported: ExportedProgram, name: str) -> ModelProgram:
    """Return an exported program as a flat graph over its own weights; nothing runs, nothing is checked.

    If blocks write in place to memory that is not their own, or run under a mode, the graph is in functional form.
    """
    with tracing():
        if _runs_under_modes(exported.graph_module) or writes_escape(exported.graph_module):
            exported = _functional(exported)
        captured = _unlifted(exported)
    inputs = captured.graph.find_nodes(op="placeholder")
    sizes = open_sizes([node.meta.get("val") for node in inputs], exported.range_constraints)
    names = tuple(node.name for node in inputs)
    leaves = pytree.tree_leaves(exported.example_inputs) if exported.example_inputs else [None] * len(names)
    examples = keep_examples(names, leaves)
    signature = Signature(exported.call_spec.in_spec, exported.call_spec.out_spec, names, sizes, examples=examples)
    return ModelProgram(captured.module(), captured, signature, name)
