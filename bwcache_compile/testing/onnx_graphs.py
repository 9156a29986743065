"""Read what `assert_cached` looks at from an ONNX model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bwcache_compile.ir.dataflow import reachable
from bwcache_compile.testing.graph_facts import Arm, GraphFacts, Guard, TensorFact

_WORK = {"MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum", "Attention", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"}
_WORK |= {"MultiHeadAttention", "GroupQueryAttention", "PackedAttention", "FusedMatMul", "FusedGemm", "FusedConv", "MatMulNBits"}


def load_model(exported: Any) -> Any:
    """Return an ONNX file, a `ModelProto` or a program that `torch.onnx.export` returned as an `onnx_ir.Model`."""
    import onnx_ir as ir

    if isinstance(exported, (str, Path)):
        return ir.load(exported)
    if isinstance(exported, ir.Model):
        return exported
    model = getattr(exported, "model", None)
    return model if isinstance(model, ir.Model) else ir.from_proto(exported)


def _graphs(node: Any) -> list[Any]:
    """Return the graphs inside of a node, such as the branches of an `If`."""
    found = []
    for attribute in node.attributes.values():
        if attribute.type.name == "GRAPH":
            found.append(attribute.value)
        elif attribute.type.name == "GRAPHS":
            found += attribute.value
    return found


def _nodes(graph: Iterable[Any]) -> Iterator[Any]:
    """Yield every node, those of inner graphs too."""
    for node in graph:
        yield node
        for inner in _graphs(node):
            yield from _nodes(inner)


def _work(nodes: Iterable[Any], functions: Any) -> int:
    """Count matrix products, convolutions and attentions, those of functions and inner graphs too."""
    count = 0
    for node in nodes:
        count += node.op_type in _WORK
        if node.op_identifier() in functions:
            count += _work(_nodes(functions[node.op_identifier()]), functions)
    return count


def _operands(node: Any) -> list[Any]:
    """Return the values that a node reads, and those that the graphs inside of it read or return."""
    values = [value for value in node.inputs if value is not None]
    for inner in _graphs(node):
        values += _captured(inner)
    return values


def _captured(graph: Any) -> list[Any]:
    values = [value for node in _nodes(graph) for value in node.inputs if value is not None]
    return [*values, *graph.outputs]


def _sources(values: Iterable[Any]) -> set[Any]:
    """Return everything that values depend on, and the values."""
    return reachable(values, lambda value: _operands(value.producer()) if value.producer() is not None else ())


def _fact(value: Any) -> TensorFact:
    dtype = value.dtype.name.lower() if value.dtype is not None else "?"
    shape = None if value.shape is None else tuple(size if isinstance(size, int) else str(size) for size in value.shape)
    return TensorFact(str(value.name), {"float": "float32", "double": "float64"}.get(dtype, dtype), shape)


def _origin(value: Any) -> Any:
    """Return what a chain of `Identity` hands on."""
    while value.producer() is not None and value.producer().op_type == "Identity":
        value = value.producer().inputs[0]
    return value


def onnx_facts(exported: Any, name: str) -> GraphFacts:
    """Return what one ONNX model takes, returns, computes and decides."""
    model = load_model(exported)
    graph, functions = model.graph, model.functions
    inputs = {value: str(value.name) for value in graph.inputs if not value.is_initializer()}

    def read(values: Iterable[Any]) -> frozenset[str]:
        return frozenset(inputs[value] for value in _sources(values) if value in inputs)

    guards = tuple(
        Guard(
            name=node.name or "If",
            predicate=read(node.inputs[:1]),
            arms=tuple(Arm(_work(_nodes(inner), functions), read(_captured(inner))) for inner in _graphs(node)),
        )
        for node in _nodes(graph)
        if node.op_type == "If"
    )
    return GraphFacts(
        name=name,
        inputs=tuple(map(_fact, inputs)),
        outputs=tuple(map(_fact, graph.outputs)),
        read=read(graph.outputs),
        written=frozenset(str(value.name) for value in graph.outputs if read([value]) and _origin(value) not in inputs),
        work=_work(_nodes(graph), functions),
        guards=guards,
    )
