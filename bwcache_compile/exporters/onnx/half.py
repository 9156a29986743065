"""Compute in float32, between casts, what an ONNX operator does not support in half precision.

No pass of onnx_ir and no rule of onnxscript's rewriter inserts casts where an operator's schema lacks a dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _cast(value: Any, dtype: Any, like: Any) -> Any:
    import onnx_ir as ir

    node = ir.node("Cast", [value], {"to": dtype}, name=f"{like.name}_{value.name}_{dtype.name.lower()}")
    node.metadata_props.update(like.metadata_props)
    node.outputs[0].dtype, node.outputs[0].shape = dtype, value.shape
    return node


def is_half(value: Any, names: tuple[str, ...] = ("BFLOAT16",)) -> bool:
    """Whether a value is bfloat16, or of another dtype of these names; None is none."""
    return value is not None and value.dtype is not None and value.dtype.name in names


def _is_narrow(value: Any) -> bool:
    return is_half(value, ("BFLOAT16", "FLOAT16"))


def admits_dtypes(node: Any, opset: int) -> bool:
    """Whether an operator of this set is defined for the half precision that a node has. In bfloat16, convolutions are from 22 on.

    A norm's result has the dtype of its weights, says the operator's definition; onnx's own checker (1.23) takes it from the input. So
    both must be the same.
    """
    import onnx

    if node.op_type == "RMSNormalization" and node.inputs[0].dtype != node.inputs[1].dtype:
        return False
    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    for values, formal in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        for i, value in enumerate(values):
            if is_half(value) and "tensor(bfloat16)" not in formal[min(i, len(formal) - 1)].types:
                return False
    return True


def between_casts(model: Any, chosen: Callable[[Any], bool]) -> None:
    """Let the chosen operators compute in float32 instead of half precision, and round their results to the same dtype as before."""
    import onnx_ir as ir

    for node in [node for node in model.graph.all_nodes() if any(map(_is_narrow, node.inputs)) and chosen(node)]:
        for i, value in enumerate(node.inputs):
            if _is_narrow(value):
                wide = _cast(value, ir.DataType.FLOAT, node)
                node.graph.insert_before(node, wide)
                node.replace_input_with(i, wide.outputs[0])
        for value in filter(_is_narrow, node.outputs):
            rounded = _cast(value, value.dtype, node)
            ir.convenience.replace_all_uses_with(value, rounded.outputs[0], replace_graph_outputs=True)
            rounded.replace_input_with(0, value)
            node.graph.insert_after(node, rounded)
            value.dtype = ir.DataType.FLOAT
