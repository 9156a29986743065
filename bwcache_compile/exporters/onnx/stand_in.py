"""Rewrite a bfloat16 bundle so that ONNX Runtime's CPU provider can run it. Only the check of an export runs the result."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from bwcache_compile.bundle.files import Bundle
from bwcache_compile.bundle.manifest import TensorEntry
from bwcache_compile.exporters.onnx.half import between_casts, is_half

T = TypeVar("T", bound=TensorEntry)

_LEFT = {"Cast", "Constant", "If"}
"""Operators that the provider has for bfloat16."""


def computes_in_half(model: Any) -> bool:
    """Whether a model does more with bfloat16 than to cast to it and from it."""
    values = [value for node in model.graph.all_nodes() if node.op_type not in _LEFT for value in (*node.inputs, *node.outputs)]
    return any(map(is_half, values))


def _with_wide_ends(model: Any) -> None:
    """Make the inputs and outputs that are bfloat16 float32, cast inside."""
    import onnx_ir as ir

    graph = model.graph
    for value in filter(is_half, graph.inputs):
        rounded = ir.node("Cast", [value], {"to": ir.DataType.BFLOAT16})
        ir.convenience.replace_all_uses_with(value, rounded.outputs[0])
        rounded.replace_input_with(0, value)
        graph.insert_before(graph[0], rounded)
        rounded.outputs[0].dtype, value.dtype = ir.DataType.BFLOAT16, ir.DataType.FLOAT
    for i, value in enumerate(graph.outputs):
        if is_half(value):
            graph.append(ir.node("Cast", [value], {"to": ir.DataType.FLOAT}))
            graph.outputs[i] = graph[-1].outputs[0]
            graph.outputs[i].dtype, graph.outputs[i].shape = ir.DataType.FLOAT, value.shape


def stand_in(bundle: Bundle) -> Bundle:
    """Write graphs beside a bundle's own that compute in float32, rounded to bfloat16 after every operator, as torch does on a CPU.

    They have the same operators in the same order on the same weights, so the check sees every wrong one; it does not see the kernels
    of the runtime that will run the bundle. All that goes in and comes out is float32.

    Returns:
        A bundle with these graphs. Its files are the caller's to remove; nothing is said of them in a manifest.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import NameFixPass

    def widened(entries: tuple[T, ...]) -> tuple[T, ...]:
        return tuple(dataclasses.replace(entry, dtype="float32") if entry.dtype == "bfloat16" else entry for entry in entries)

    manifest, graphs = bundle.manifest, {}
    for kind, entry in manifest.graphs.items():
        model = ir.load(bundle.graph_file(kind))
        for value in model.graph.outputs:
            value.name = f"{value.name}.inner"
        between_casts(model, lambda node: node.op_type not in _LEFT and any(map(is_half, node.inputs)))
        _with_wide_ends(model)
        for value, name in zip(model.graph.outputs, entry.outputs, strict=True):
            value.name = name
        NameFixPass()(model)
        file = f"stand_in.{entry.file}"
        graphs[kind] = dataclasses.replace(entry, file=file)
        ir.save(model, bundle.folder / file)
    outputs = dataclasses.replace(manifest.outputs, items=widened(manifest.outputs.items))
    wide = dataclasses.replace(manifest, inputs=widened(manifest.inputs), slots=widened(manifest.slots), outputs=outputs, graphs=graphs)
    return dataclasses.replace(bundle, manifest=wide)
