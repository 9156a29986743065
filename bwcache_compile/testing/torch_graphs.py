"""Read what `assert_cached` looks at from a program that `torch.export` made."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node

from bwcache_compile.ir.dataflow import reachable, writes_escape
from bwcache_compile.ir.graph_text import called_graphs, op_counts, op_name
from bwcache_compile.ir.tracing import tracing
from bwcache_compile.ir.tree_paths import leaf_paths, output_name
from bwcache_compile.testing.graph_facts import Arm, GraphFacts, Guard, TensorFact

_WORK = re.compile(r"linear|matmul|mm|addmm|bmm|baddbmm|einsum|_?conv.*|.*attention.*|_transformer_encoder_layer_fwd")
_HANDED_ON = {"alias", "clone", "detach", "getitem", "lift_fresh_copy"}


def _work(module: GraphModule) -> int:
    return sum(count for name, count in op_counts(module).items() if _WORK.fullmatch(name))


def _sources(nodes: Iterable[Node]) -> set[Node]:
    """Return everything that nodes depend on, and the nodes."""
    return reachable(nodes, lambda node: node.all_input_nodes)


def _fact(name: str, node: Any) -> TensorFact:
    value = node.meta.get("val") if isinstance(node, Node) else node
    if not isinstance(value, Tensor):
        return TensorFact(name, type(value).__name__, None)
    shape = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
    return TensorFact(name, str(value.dtype).removeprefix("torch."), shape)


def _origin(node: Any) -> Any:
    """Return what a chain of copies hands on."""
    while isinstance(node, Node) and node.op == "call_function" and op_name(node) in _HANDED_ON and len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
        if node.op == "call_function" and op_name(node) == "cond":
            break
    return node


def _guards(module: GraphModule, read: Any) -> list[Guard]:
    found = []
    for node in module.graph.nodes:
        if node.op != "call_function" or op_name(node) != "cond":
            continue
        operands = node.args[3] if len(node.args) > 3 else ()
        arms = []
        for _, inner in called_graphs(module, node):
            places = inner.graph.find_nodes(op="placeholder")
            assert isinstance(operands, (list, tuple))
            used = [given for given, place in zip(operands, places, strict=True) if place.users and isinstance(given, Node)]
            arms.append(Arm(_work(inner), read(used)))
        found.append(Guard(node.name, read([node.args[0]] if isinstance(node.args[0], Node) else []), tuple(arms)))
    return found


def torch_facts(exported: ExportedProgram, name: str) -> GraphFacts:
    """Return what an exported program takes, returns, computes and decides; buffers that it writes to are state."""
    if writes_escape(exported.graph_module):
        with tracing():
            exported = exported.run_decompositions({})  # in functional form, whose signature says what is written
    module, signature = exported.graph_module, exported.graph_signature
    kinds = {spec.arg.name: spec for spec in signature.input_specs}
    buffers = {target: placed for placed, target in signature.inputs_to_buffers.items()}
    mutated = {output: buffers[target] for output, target in signature.buffers_to_mutate.items()} | dict(signature.user_inputs_to_mutate)
    inputs: dict[Node, str] = {}
    for node in module.graph.find_nodes(op="placeholder"):
        spec = kinds[node.name]
        if spec.kind == InputKind.USER_INPUT or node.name in mutated.values():
            inputs[node] = str(spec.target) if node.name in signature.inputs_to_buffers else node.name

    def read(nodes: Iterable[Node]) -> frozenset[str]:
        return frozenset(inputs[node] for node in _sources(nodes) if node in inputs)

    names = map(output_name, leaf_paths(exported.call_spec.out_spec)) if exported.call_spec.out_spec is not None else iter(())
    returned = module.graph.output_node().args[0]
    assert isinstance(returned, (list, tuple))
    by_name = {node.name: node for node in inputs}
    outputs: dict[str, Any] = {}
    pairs = {}
    for value in returned:
        if isinstance(value, Node) and value.name in mutated:
            state = inputs[by_name[mutated[value.name]]]
            pairs[state] = f"{state} (written)"
            outputs[pairs[state]] = value
        else:
            outputs[next(names)] = value
    changed = {name: node for name, node in outputs.items() if isinstance(node, Node) and _origin(node) not in inputs}
    return GraphFacts(
        name=name,
        inputs=tuple(_fact(name, node) for node, name in inputs.items()),
        outputs=tuple(_fact(name, node) for name, node in outputs.items()),
        read=read(node for node in outputs.values() if isinstance(node, Node)),
        written=frozenset(name for name, node in changed.items() if read([node])),
        work=_work(module),
        guards=tuple(_guards(module, read)),
        pairs=pairs,
    )
