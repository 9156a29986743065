"""Rewrite complex tensors as real ones with a last dimension of 2: ONNX lacks complex operators, and rotary embeddings use them.

torch.onnx does so for some operators, but onnxscript 0.7 has no complex form of `select`, `unsqueeze`, `expand`, `unbind`, `split`,
`index` or `exp`, among others.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from bwcache_compile.errors import ExportError
from bwcache_compile.exporters.onnx.legalize import put
from bwcache_compile.ir.torch_compat import pytree

aten = torch.ops.aten

_REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}
_MOVES = {
    aten.view, aten.reshape, aten._unsafe_view, aten.expand, aten.permute, aten.transpose, aten.unsqueeze, aten.squeeze, aten.select,
    aten.slice, aten.split, aten.split_with_sizes, aten.unbind, aten.cat, aten.stack, aten.index, aten.index_select, aten.flip,
    aten.repeat, aten.clone, aten.alias, aten.detach, aten.pad_sequence, aten.pad, aten.constant_pad_nd, aten._to_copy, aten.neg,
    aten.copy, aten.slice_scatter, aten.select_scatter, aten.index_put,
}  # fmt: skip
"""Operators that treat a pair as they treat a number, once their arguments leave the last dimension alone."""


def _rank(value: Any) -> int | None:
    """Return the dimensions of the complex tensor that a value is or holds; None if it holds none."""
    ranks = [leaf.dim() for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_complex()]
    return ranks[0] if ranks else None


def _moving(name: str, value: Any, packet: Any, rank: int) -> Any:
    """Return an argument of an operator for operands in which each number has become a pair.

    Raises:
        NotImplementedError: The operator cannot treat pairs as it treats numbers.
    """
    if name in ("dim", "dim0", "dim1", "dims"):
        dimensions = [d % (rank + (packet in (aten.unsqueeze, aten.stack))) for d in pytree.tree_leaves(value)]
        return dimensions[0] if isinstance(value, int) else dimensions + ([rank] if packet is aten.permute else [])
    if name == "dtype" and value is not None:
        if value not in _REAL:
            raise NotImplementedError
        return _REAL[value]
    if (name in ("value", "padding_value") and value) or (name == "mode" and value != "constant"):
        raise NotImplementedError
    if name in ("size", "repeats"):
        return [*value, 2 if name == "size" else 1]
    return [0, 0, *value] if name == "pad" else value


def _rewritten(graph: Graph, node: Node, ranks: dict[Node, int]) -> Node:
    """Insert the real form of a node before it, and return that.

    Raises:
        NotImplementedError: There is no rule for it.
    """

    def call(target: Any, *args: Any, **kwargs: Any) -> Any:
        return put(graph, target, args, node, **kwargs)

    def parts(value: Any) -> tuple[Any, Any]:
        """Return the real and the imaginary part, which is None if there is none."""
        if isinstance(value, complex):
            return value.real, value.imag
        return tuple(call(aten.select.int, value, -1, i) for i in (0, 1)) if value in ranks else (value, None)

    def pair(real: Any, imaginary: Any) -> Node:
        return call(aten.stack.default, [real, imaginary], -1)

    def paired(value: Any) -> Any:
        """Return an operand as pairs; a real one has an imaginary part of zeros."""
        if value in ranks:
            return value
        real = call(aten._to_copy.default, value, dtype=_REAL[node.meta["val"].dtype])
        return pair(real, call(aten.zeros_like.default, real))

    def times(a: Any, b: Any) -> Any:
        return call(aten.mul.Tensor, a, b) if isinstance(a, Node) else call(aten.mul.Tensor, b, a)

    packet = getattr(node.target, "overloadpacket", node.target)
    args: tuple[Any, ...] = node.args
    if packet in (aten.view_as_complex, aten.view_as_real):
        return call(aten.alias.default, args[0])
    if packet is operator.getitem:
        return call(operator.getitem, *args)
    complex_args = [n for n in node.all_input_nodes if n in ranks]
    if packet in _MOVES and complex_args:
        if node not in ranks:  # a write into real numbers drops the imaginary parts
            raise NotImplementedError
        if packet in (aten.cat, aten.stack):
            args = ([paired(value) for value in args[0]], *args[1:])
        if packet in (aten.copy, aten.slice_scatter, aten.select_scatter):
            args = (args[0], paired(args[1]), *args[2:])
        specs, rank = node.target._schema.arguments, ranks[complex_args[0]]  # type: ignore[union-attr]
        moved = [_moving(spec.name, value, packet, rank) for spec, value in zip(specs, args, strict=False)]
        return call(node.target, *moved, **{name: _moving(name, value, packet, rank) for name, value in node.kwargs.items()})
    if packet in (aten.add, aten.sub) and all(isinstance(value, Node) for value in args) and not node.kwargs:
        return call(node.target, *map(paired, args))
    if packet is aten.zeros:
        return call(node.target, [*args[0], 2], **{**node.kwargs, "dtype": _REAL[node.meta["val"].dtype]})
    if packet is aten.gather:
        dimension = args[1] % max(ranks[args[0]], 1)
        index = call(aten.unsqueeze.default, args[2], -1)
        return call(node.target, args[0], dimension, call(aten.expand.default, index, [-1] * args[2].meta["val"].dim() + [2]))
    if packet is aten.polar:
        return pair(times(args[0], call(aten.cos.default, args[1])), times(args[0], call(aten.sin.default, args[1])))
    if packet is aten.complex:
        return pair(*args)
    if packet is aten.mul:
        (a, b), (c, d) = parts(args[0]), parts(args[1])
        if b is None or d is None:
            real, imaginary = times(a, c), times(a, d) if b is None else times(b, c)
        else:
            real = call(aten.sub.Tensor, times(a, c), times(b, d))
            imaginary = call(aten.add.Tensor, times(a, d), times(b, c))
        return pair(real, imaginary)
    a, b = parts(args[0])
    if packet is aten.div and args[1] not in ranks and not isinstance(args[1], complex):
        return pair(call(aten.div.Tensor, a, args[1]), call(aten.div.Tensor, b, args[1]))
    if packet in (aten._conj, aten.conj_physical):
        return pair(a, call(aten.neg.default, b))
    if packet is aten.abs:
        return call(aten.sqrt.default, call(aten.add.Tensor, times(a, a), times(b, b)))
    if packet is aten.exp:
        size = call(aten.exp.default, a)
        return pair(times(size, call(aten.cos.default, b)), times(size, call(aten.sin.default, b)))
    raise NotImplementedError


def _weights_as_pairs(exported: ExportedProgram) -> None:
    for table in (exported.state_dict, exported.constants):
        for name, value in list(table.items()):
            if isinstance(value, Tensor) and value.is_complex():
                pairs = torch.view_as_real(value.detach().resolve_conj())
                table[name] = nn.Parameter(pairs, requires_grad=False) if isinstance(value, nn.Parameter) else pairs


def complex_as_pairs(exported: ExportedProgram) -> ExportedProgram:
    """Return a program without complex numbers: each tensor of shape `s` is a real one of shape `(*s, 2)`, at its ends too.

    The program itself if it has none. Otherwise it is first brought to a form without nested graphs and writes in place.

    Raises:
        ExportError: An operator on complex numbers has no such form.
    """
    modules = [module for module in exported.graph_module.modules() if isinstance(module, GraphModule)]
    if all(_rank(node.meta.get("val")) is None for module in modules for node in module.graph.nodes):
        return exported
    exported = exported.run_decompositions({})
    graph, module = exported.graph, exported.graph_module
    ranks = {node: rank for node in graph.nodes if (rank := _rank(node.meta.get("val"))) is not None}
    with module._set_replace_hook(exported.graph_signature.get_replace_hook()):
        for node in list(graph.nodes):
            if node.op == "placeholder" and node in ranks:
                node.meta["val"] = torch.view_as_real(node.meta["val"])
            if node.op != "call_function" or not ({node, *node.all_input_nodes} & ranks.keys()):
                continue
            if node.target is aten._assert_tensor_metadata.default:  # says what dtype it was
                graph.erase_node(node)
                continue
            with graph.inserting_before(node):
                try:
                    new = _rewritten(graph, node, ranks)
                except NotImplementedError as error:
                    written = node.meta.get("custom", {}).get("bwcache_node", node.name)
                    raise ExportError(
                        f"{written} applies {node.target} to complex numbers, which ONNX does not support and which cannot be"
                        " rewritten for real ones.\n"
                        "  Write it with real and imaginary parts; products, sums and reshapes are rewritten automatically."
                    ) from error
            if node in ranks:
                ranks[new] = ranks[node]
            node.replace_all_uses_with(new)
            graph.erase_node(node)
    _weights_as_pairs(exported)
    graph.eliminate_dead_code()
    module.recompile()
    return exported
