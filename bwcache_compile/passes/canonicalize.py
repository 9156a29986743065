"""Take away what does nothing at run time, so that equal blocks look equal."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from bwcache_compile.ir.dataflow import eliminate_dead_code
from bwcache_compile.ir.program import ModelProgram, PassResult
from bwcache_compile.ir.sizes import shape_of

aten = torch.ops.aten
flex_attention = torch.ops.higher_order.flex_attention
_ASSERTS = (
    aten._assert_tensor_metadata.default,
    aten._assert_async.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
)
_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default)


def _changes_nothing(node: Node) -> bool:
    """Whether a cast returns its own input, by the rules of `Tensor.to`."""
    before, after = node.args[0].meta.get("val") if isinstance(node.args[0], Node) else None, node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    schema = node.target._schema  # type: ignore[union-attr]
    given = {a.name: node.args[i] for i, a in enumerate(schema.arguments) if i < len(node.args)} | dict(node.kwargs)
    if given.get("copy") or given.get("memory_format") is not None:
        return False
    return (before.dtype, before.device, before.layout) == (after.dtype, after.device, after.layout)


def _takes_all(node: Node) -> bool:
    """Whether a slice takes everything: an exporter writes such slices in one block and leaves them out in the next."""
    source, start = node.args[0], node.args[2] if len(node.args) > 2 else None
    if not isinstance(source, Node) or len(node.args) > 4 or start not in (0, None):
        return False
    return shape_of(source.meta["val"]) == shape_of(node.meta["val"])


def _is_noop(node: Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target in _CASTS:
        return _changes_nothing(node)
    if node.target is aten.slice.Tensor:
        return _takes_all(node)
    if node.target is aten.dropout.default:
        return bool(node.args[1] == 0.0 or node.args[2] is False)
    return node.target in (aten.alias.default, aten.detach.default)


def canonicalize(program: ModelProgram) -> PassResult:
    """Leave no runtime assert, no cast to the same dtype, no slice of everything, no inactive dropout and no dead code in the graph.

    Flex attention is left without the empty lists of its functions' tensors, with which torch.compile does not trace it.
    What is taken away returns its own input, so the graph computes the same bits. Writes in place that somebody
    reads, and writes that the caller can see, stay.
    """
    graph = program.compute.graph
    modified = False
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _ASSERTS:
            graph.erase_node(node)
            modified = True
        elif node.target is flex_attention and node.args[7:] == ((), ()):
            node.args, modified = node.args[:7], True
        elif _is_noop(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            modified = True
    return PassResult(program, eliminate_dead_code(graph) or modified)
