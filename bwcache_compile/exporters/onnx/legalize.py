"""Legalize ATen operators whose ONNX counterparts are more restrictive.

torch.onnx translates one operator at a time and admits custom translations; these rewrites need the dtypes and shapes around it.
"""

from __future__ import annotations

import contextlib
from typing import Any, cast

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from bwcache_compile.ir.torch_compat import detect_fake_mode, is_concrete_int, statically_known_true

_CARRIED = ("custom", "stack_trace", "nn_module_stack")
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_OPERATOR = 23
"""From this operator set on attention is one operator."""


def put(graph: Graph, target: Any, args: tuple[Any, ...], like: Node, **kwargs: Any) -> Node:
    """Add a call at the graph's insertion point, described, and marked like the node that it helps to replace."""
    node = graph.call_function(target, args, kwargs)
    node.meta = {key: like.meta[key] for key in _CARRIED if key in like.meta}
    given = map_arg((args, kwargs), lambda n: n.meta["val"])
    with detect_fake_mode((given, like.meta.get("val"))) or contextlib.nullcontext():
        node.meta["val"] = target(*given[0], **given[1])
    return node


def _without_idle_squeezes(graph: Graph) -> None:
    """Remove squeezes of a dimension that is not 1: torch returns the tensor as it is, ONNX's operator fails."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.squeeze.dim):
        source, dimension = node.args
        assert isinstance(source, Node)
        if not statically_known_true(source.meta["val"].shape[dimension] == 1):
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _one(size: Any) -> bool:
    return statically_known_true(size == 1)


def _full_mask(graph: Graph, node: Node, mask: Node, query: Node, key: Node) -> Node:
    """Return a mask with a row for every query and a column for every key: ONNX Runtime's `Attention` takes no fewer."""
    rows, columns = mask.meta["val"].shape[-2:]
    sizes: list[Any] = [-1] * mask.meta["val"].dim()
    for place, size, source in ((-2, rows, query), (-1, columns, key)):
        if _one(size) and not _one(source.meta["val"].shape[-2]):
            sizes[place] = put(graph, torch.ops.aten.sym_size.int, (source, source.meta["val"].dim() - 2), node)
    return mask if sizes == [-1] * len(sizes) else put(graph, torch.ops.aten.expand.default, (mask, sizes), node)


def _fit_attention(graph: Graph, opset: int) -> None:
    """Give attention four dimensions, full masks, and grouped heads only where there are groups."""
    for node in graph.find_nodes(op="call_function", target=_ATTENTION):
        query, key, value, *rest = cast("list[Any]", node.args)
        mask = rest[0] if rest else node.kwargs.get("attn_mask")
        lacking = 4 - query.meta["val"].dim()
        with graph.inserting_before(node):
            for _ in range(lacking):
                query, key, value = (put(graph, torch.ops.aten.unsqueeze.default, (part, 0), node) for part in (query, key, value))
            batches = [put(graph, torch.ops.aten.sym_size.int, (query, i), node) for i in range(-lacking + 1)] if lacking < 0 else []
            if batches and isinstance(mask, Node) and mask.meta["val"].dim() > 3:
                mask = put(graph, torch.ops.aten.expand.default, (mask, [*batches, -1, -1, -1]), node)
                mask = put(graph, torch.ops.aten.flatten.using_ints, (mask, 0, -4), node)
            if batches:
                query, key, value = (put(graph, torch.ops.aten.flatten.using_ints, (part, 0, -4), node) for part in (query, key, value))
            if isinstance(mask, Node) and opset >= _OPERATOR:
                mask = _full_mask(graph, node, mask, query, key)
            kwargs = {**node.kwargs, **({"attn_mask": mask} if not rest else {})}
            if statically_known_true(query.meta["val"].shape[-3] == key.meta["val"].shape[-3]):
                kwargs.pop("enable_gqa", None)
            fitted: Node = put(graph, _ATTENTION, (query, key, value, mask, *rest[1:]) if rest else (query, key, value), node, **kwargs)
            for _ in range(lacking):
                fitted = put(graph, torch.ops.aten.squeeze.dim, (fitted, 0), node)
            if batches:
                fitted = put(graph, torch.ops.aten.unflatten.int, (fitted, 0, batches), node)
        node.replace_all_uses_with(fitted)
        graph.erase_node(node)


def _with_known_sizes(graph: Graph) -> None:
    """Say how much a mask takes where the program knows it: torch.onnx traces once more, and would not."""
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()) or not isinstance(value, Tensor):
            continue
        if any(n.meta["val"].dtype is torch.bool for n in node.all_input_nodes) and all(map(is_concrete_int, value.shape)):
            with graph.inserting_after(node):
                sized = put(graph, torch.ops.aten.reshape.default, (node, list(map(int, value.shape))), node)
            node.replace_all_uses_with(sized, delete_user_cb=lambda user, sized=sized: user is not sized)


def _without_scattered_means(graph: Graph) -> None:
    """Divide a sum by a count: ONNX scatters no means, and torch.onnx would write the last value instead."""
    scatter = torch.ops.aten.scatter_reduce.two
    for node in graph.find_nodes(op="call_function", target=scatter):
        target, dimension, index, values, reduce, *include = node.args
        if reduce != "mean" or (*include, node.kwargs.get("include_self", True))[0] is not True:
            continue
        with graph.inserting_before(node):
            total = put(graph, scatter, (target, dimension, index, values, "sum"), node)
            ones = [put(graph, torch.ops.aten.ones_like.default, (tensor,), node) for tensor in (target, values)]
            count = put(graph, scatter, (ones[0], dimension, index, ones[1], "sum"), node)
            mean = put(graph, torch.ops.aten.div.Tensor, (total, count), node)
        node.replace_all_uses_with(mean)
        graph.erase_node(node)


def _fit_einsum(graph: Graph) -> None:
    """Give an einsum operands of one dtype, which is all that ONNX's operator takes."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.einsum.default):
        operands, dtype = cast("list[Node]", node.args[1]), node.meta["val"].dtype
        with graph.inserting_before(node):
            node.update_arg(1, [put(graph, torch.ops.aten.to.dtype, (operand, dtype), node) for operand in operands])


def _fit_layer_norm(graph: Graph) -> None:
    """Normalize in the wider dtype where the parameters have another than the input: ONNX's operator takes one dtype for all."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.layer_norm.default):
        source, shape, *rest = cast("list[Any]", node.args)
        dtypes = {operand.meta["val"].dtype for operand in (source, *rest[:2]) if isinstance(operand, Node)}
        if len(dtypes) < 2:
            continue
        wide = torch.float32 if torch.float64 not in dtypes else torch.float64
        with graph.inserting_before(node):
            widened = [put(graph, torch.ops.aten.to.dtype, (o, wide), node) if isinstance(o, Node) else o for o in (source, *rest[:2])]
            normal = put(graph, node.target, (widened[0], shape, *widened[1:], *rest[2:]), node, **node.kwargs)
            rounded = put(graph, torch.ops.aten.to.dtype, (normal, node.meta["val"].dtype), node)
        node.replace_all_uses_with(rounded)
        graph.erase_node(node)


def legalize(exported: ExportedProgram, opset: int) -> None:
    """Rewrite a program, nested graphs too, so that ONNX's operators of this set compute what torch's do."""
    for module in exported.graph_module.modules():
        if isinstance(module, GraphModule):
            _without_idle_squeezes(module.graph)
            _fit_attention(module.graph, opset)
            _fit_einsum(module.graph)
            _fit_layer_norm(module.graph)
            _without_scattered_means(module.graph)
            _with_known_sizes(module.graph)
            module.recompile()
