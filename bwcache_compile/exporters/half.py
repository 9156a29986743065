"""bfloat16 where an operator of ONNX has none: it computes in float32 between casts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _cast(value: Any, dtype: Any, like: Any) -> Any:
    import onnx_ir as ir

    node = ir.node("Cast", [value], {"to": dtype}, name=f"{like.name}_{value.name}_{dtype.name.lower()}")
    node.metadata_props.update(like.metadata_props)
    node.outputs[0].dtype, node.outputs[0].shape = dtype, value.shape
    return node


def is_half(value: Any) -> bool:
    """Whether a value is bfloat16; None is none."""
    return value is not None and value.dtype is not None and value.dtype.name == "BFLOAT16"


def admits_half(node: Any, opset: int) -> bool:
    """Whether an operator of this set is defined for bfloat16 where a node has it. Convolutions are from 22 on."""
    import onnx

    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    for values, formal in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        for i, value in enumerate(values):
            if is_half(value) and "tensor(bfloat16)" not in formal[min(i, len(formal) - 1)].types:
                return False
    return True


def between_casts(model: Any, chosen: Callable[[Any], bool]) -> None:
    """Let the chosen operators compute in float32, and round their results to bfloat16 as before."""
    import onnx_ir as ir

    half, single = ir.DataType.BFLOAT16, ir.DataType.FLOAT
    for node in [node for node in model.graph.all_nodes() if any(map(is_half, node.inputs)) and chosen(node)]:
        for i, value in enumerate(node.inputs):
            if is_half(value):
                wide = _cast(value, single, node)
                node.graph.insert_before(node, wide)
                node.replace_input_with(i, wide.outputs[0])
        for value in filter(is_half, node.outputs):
            rounded = _cast(value, half, node)
            ir.convenience.replace_all_uses_with(value, rounded.outputs[0], replace_graph_outputs=True)
            rounded.replace_input_with(0, value)
            node.graph.insert_after(node, rounded)
            value.dtype = single
