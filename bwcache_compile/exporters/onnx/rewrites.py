"""Rewrite ONNX models that torch.onnx made: names, shapes, constants, and operators that ONNX Runtime has no kernels for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import onnx_ir as ir

SMALL = 1024
"""Bytes up to which a constant stays in its graph: shapes must be there for shape inference."""


def _copied_output(graph: Any, value: Any) -> Any:
    """Return a copy for an output that is an input, a weight or another output already; onnx_ir's `OutputFixPass` leaves weights out."""
    import onnx_ir as ir

    node = ir.node("Identity", [value])
    graph.append(node)
    copy = node.outputs[0]
    copy.shape, copy.type = value.shape, value.type
    return copy


def rename(graph: Any, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
    """Give inputs and outputs their names for the outside."""
    taken = {*inputs, *outputs}
    seen: set[Any] = set()
    for i, value in enumerate(graph.outputs):
        if value in seen or value.is_graph_input() or value.is_initializer():
            graph.outputs[i] = _copied_output(graph, value)
        seen.add(graph.outputs[i])
    named = {*graph.inputs, *graph.outputs}
    for node in graph.all_nodes():
        for value in node.outputs:
            if value.name in taken and value not in named:
                value.name = f"{value.name}.inner"
    for prefix in ("__bwcache__", ""):  # twice, since the new names may be the old ones in another order
        for value, name in zip([*graph.inputs, *graph.outputs], [*inputs, *outputs], strict=True):
            value.name = prefix + name


def _may_fold(node: Any) -> bool | None:
    """Leave weights as the model has them: a transposed copy would lose its name, and the share it has in the file."""
    weights = (value for value in node.inputs if value is not None and value.is_initializer() and value.const_value is not None)
    return False if any(value.const_value.nbytes > SMALL for value in weights) else None


def simplify(model: ir.Model) -> None:
    """Fold constants, share what is computed twice, and drop what nobody reads.

    `onnxscript.optimizer.optimize` would also rewrite by patterns, one of which takes `x + 1e-15` for `x + 0`: the linear
    attention of Sana then divides zero by zero.
    """
    import onnxscript.optimizer
    from onnx_ir.passes import common
    from onnxscript.rewriter import onnx_fusions

    common.InlinePass()(model)
    onnxscript.optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=_may_fold)
    for step in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        step(model)
    onnx_fusions.fuse(model)


def without_bool_where(graph: Any) -> None:
    """Replace `Where` on bool by logic: ONNX Runtime has no kernel for it, and no pass of onnx_ir or onnxscript does so."""
    import onnx_ir as ir

    for node in [node for node in graph.all_nodes() if node.op_type == "Where"]:
        condition, yes, no = node.inputs
        if yes is None or yes.dtype != ir.DataType.BOOL:
            continue
        negated = ir.node("Not", [condition])
        left, right = ir.node("And", [condition, yes]), ir.node("And", [negated.outputs[0], no])
        either = ir.node("Or", [left.outputs[0], right.outputs[0]])
        for part, role in ((negated, "not"), (left, "yes"), (right, "no"), (either, "either")):
            part.name = f"{node.name}_{role}"
            part.outputs[0].name = f"{node.outputs[0].name}_{role}"
            part.metadata_props.update(node.metadata_props)
            part.outputs[0].dtype = ir.DataType.BOOL
        either.outputs[0].shape = node.outputs[0].shape
        ir.convenience.replace_nodes_and_values(
            node.graph, node, [node], [negated, left, right, either], [node.outputs[0]], [either.outputs[0]]
        )


def store_transposed(model: ir.Model) -> None:
    """Store each weight that is only read transposed as it is read, under the name `weight.T`.

    onnxruntime would do so when it opens the model, and hold both copies meanwhile; in an `If` it keeps both. onnxscript's
    constant folding would make a copy under a name of its own, which the graphs could not share.
    """
    import onnx_ir as ir

    for value in list(model.graph.initializers.values()):
        raw: Any = getattr(value.const_value, "raw", None)
        users: list[Any] = [use.node for use in value.uses()]
        if not isinstance(raw, torch.Tensor) or raw.nbytes <= SMALL or [node.op_type for node in users] != ["Transpose"]:
            continue
        (node,) = users
        order = node.attributes.get_ints("perm", tuple(reversed(range(raw.dim()))))
        stored = ir.tensor_adapters.TorchTensor(raw.permute(*order), f"{value.name}.T")
        transposed = ir.Value(name=stored.name, shape=ir.Shape(stored.shape), type=value.type, const_value=stored)
        model.graph.register_initializer(transposed)
        ir.convenience.replace_all_uses_with(node.outputs[0], transposed, replace_graph_outputs=True)
        node.graph.remove(node, safe=True)
        del model.graph.initializers[str(value.name)]


def strip(model: ir.Model) -> None:
    """Remove stack traces and whatever else describes the machine that exported.

    onnx_ir's `ClearMetadataAndDocStringPass` leaves the metadata of the model and of its values.
    """
    model.metadata_props.clear()
    model.doc_string = None
    for graph in model.graphs():
        graph.metadata_props.clear()
        graph.doc_string = None
        for value in [*graph.inputs, *graph.outputs, *graph.initializers.values()]:
            value.metadata_props.clear()
            value.doc_string = None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            value.doc_string = None


def declare(model: ir.Model, shapes: Mapping[str, Sequence[int | str]]) -> None:
    """Write the shapes of inputs and outputs as the program knows them, and none inside where sizes are open.

    While it decomposes, torch asks its solver, which answers for the size at hand: what it notes down may be too narrow.
    """
    import onnx_ir as ir

    if any(isinstance(size, str) for shape in shapes.values() for size in shape):
        for graph in model.graphs():
            for node in graph:
                for value in node.outputs:
                    value.shape = None
    for value in [*model.graph.inputs, *model.graph.outputs]:
        value.shape = ir.Shape(shapes[str(value.name)])
