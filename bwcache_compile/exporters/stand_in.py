"""A bfloat16 bundle as ONNX Runtime's CPU provider can run it: what the check runs in its place, and nobody else."""

from __future__ import annotations

import dataclasses
from typing import Any

from bwcache_compile.exporters.bundle import Bundle

_HALF = "bfloat16"
_LEFT = {"Cast", "Constant", "If"}
"""Operators that the provider has for bfloat16."""


def _cast(value: Any, dtype: Any) -> Any:
    import onnx_ir as ir

    node = ir.node("Cast", [value], {"to": dtype})
    node.outputs[0].dtype, node.outputs[0].shape = dtype, value.shape
    return node


def computes_in_half(model: Any) -> bool:
    """Whether a model does more with bfloat16 than to cast to it and from it."""
    values = [value for node in model.graph.all_nodes() if node.op_type not in _LEFT for value in (*node.inputs, *node.outputs)]
    return any(value is not None and value.dtype is not None and value.dtype.name == "BFLOAT16" for value in values)


def _between_casts(model: Any) -> None:
    """Let each operator compute in float32 and round its results as before; what goes in and out is float32."""
    import onnx_ir as ir
    from onnx_ir.passes.common import NameFixPass

    half, single, graph = ir.DataType.BFLOAT16, ir.DataType.FLOAT, model.graph
    names = [value.name for value in graph.outputs]
    for value in graph.outputs:
        value.name = f"{value.name}.inner"
    for node in [node for node in model.graph.all_nodes() if node.op_type not in _LEFT]:
        halves = [i for i, value in enumerate(node.inputs) if value is not None and value.dtype == half]
        for i in halves:
            wide = _cast(node.inputs[i], single)
            node.graph.insert_before(node, wide)
            node.replace_input_with(i, wide.outputs[0])
        for value in [value for value in node.outputs if halves and value.dtype == half]:
            rounded = _cast(value, half)
            ir.convenience.replace_all_uses_with(value, rounded.outputs[0], replace_graph_outputs=True)
            rounded.replace_input_with(0, value)
            node.graph.insert_after(node, rounded)
            value.dtype = single
    for value in [value for value in graph.inputs if value.dtype == half]:
        rounded = _cast(value, half)
        ir.convenience.replace_all_uses_with(value, rounded.outputs[0])
        rounded.replace_input_with(0, value)
        graph.insert_before(graph[0], rounded)
        value.dtype = single
    for i, value in enumerate(graph.outputs):
        if value.dtype == half:
            graph.append(_cast(value, single))
            graph.outputs[i] = graph[-1].outputs[0]
        graph.outputs[i].name = names[i]
    NameFixPass()(model)


def stand_in(bundle: Bundle) -> Bundle:
    """Write graphs beside a bundle's own that compute in float32, rounded to bfloat16 after every operator, as torch does on a CPU.

    They have the same operators in the same order on the same weights, so the check sees every wrong one; it does not see the kernels
    of the runtime that will run the bundle. All that goes in and comes out is float32.

    Returns:
        A bundle with these graphs. Its files are the caller's to remove; nothing is said of them in a manifest.
    """
    import onnx_ir as ir

    def widened(entry: dict[str, Any]) -> dict[str, Any]:
        return {**entry, "dtype": "float32"} if entry["dtype"] == _HALF else entry

    manifest, graphs = bundle.manifest, {}
    for kind, entry in manifest["graphs"].items():
        model = ir.load(bundle.graph_file(kind))
        _between_casts(model)
        graphs[kind] = {**entry, "file": f"stand_in.{entry['file']}"}
        ir.save(model, bundle.folder / graphs[kind]["file"])
    wide = {name: [widened(entry) for entry in manifest[name]] for name in ("inputs", "slots")}
    outputs = {**manifest["outputs"], "items": [widened(entry) for entry in manifest["outputs"]["items"]]}
    return dataclasses.replace(bundle, manifest={**manifest, **wide, "outputs": outputs, "graphs": graphs})
