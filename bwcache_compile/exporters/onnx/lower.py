"""Write plain graphs as ONNX models with stable names and no metadata. All weights are in one file beside them, each once.

`onnx_ir.save` would write a weight file for each model, and so store the weights that two graphs read twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bwcache_compile.errors import ExportError, first_line
from bwcache_compile.exporters.graphs import PlainGraph
from bwcache_compile.exporters.onnx import rewrites
from bwcache_compile.exporters.onnx.complex_pairs import complex_as_pairs
from bwcache_compile.exporters.onnx.half import admits_dtypes, between_casts
from bwcache_compile.exporters.onnx.legalize import legalize
from bwcache_compile.exporters.weights import WeightFile
from bwcache_compile.graph_io import GraphIO
from bwcache_compile.ir.program import REGION_MARK
from bwcache_compile.ir.tracing import tracing

if TYPE_CHECKING:
    import onnx_ir as ir

OPSETS = range(18, 25)
OTHERWISE = "Try a later operator set (opset=23), whose operators support more dtypes; else compute it in float32, or with other operators."
_FX_NODE = "pkg.torch.onnx.fx_node"


@dataclasses.dataclass(frozen=True)
class OnnxGraph:
    """One graph as an ONNX model that still holds its weights in memory.

    Attributes:
        kind: `compute`, `reuse` or `guarded`.
        model: The model.
        region: Of each operator that came from the cached region: its name here, and the node it was.
        origins: The same of every operator, as far as the exporter said it.
        unmarked: How many operators the exporter made without saying from what: folded constants, fused patterns.
    """

    kind: str
    model: ir.Model
    region: dict[str, str]
    origins: dict[str, str]
    unmarked: int

    @property
    def weights(self) -> set[str]:
        """Names of the weights that it reads."""
        return {name.removesuffix(".T") for name in self.model.graph.initializers}


def _origins(program: Any) -> dict[str, dict[str, Any]]:
    """Return what each node of the decomposed graphs says about where it came from."""
    modules = (m for m in program.exported_program.graph_module.modules() if isinstance(m, torch.fx.GraphModule))
    return {
        node.name: node.meta["custom"] for module in modules for node in module.graph.nodes if REGION_MARK in node.meta.get("custom", {})
    }


def _name_operators(model: ir.Model, origins: dict[str, dict[str, Any]]) -> tuple[dict[str, str], dict[str, str], int]:
    """Find out which node each operator was, and put the module that it came from before its name: `blocks.0.attn/MatMul_3`.

    Returns the nodes of the region's operators and those of all, by the operator's name, and how many came from none.

    What a fusion made takes the module of what it reads. Names are what a runtime's messages, profiles and viewers show.
    """
    region: dict[str, str] = {}
    known: dict[str, str] = {}
    unmarked = 0
    modules: dict[Any, str] = {}
    for i, node in enumerate(model.graph.all_nodes()):
        printed = str(node.metadata_props.get(_FX_NODE, ""))
        origin = origins.get(printed.split(" ", 1)[0].removeprefix("%"))
        unmarked += origin is None
        nearest = next((modules[value.producer()] for value in node.inputs if value is not None and value.producer() in modules), "")
        modules[node] = nearest if origin is None else origin["bwcache_module"]
        node.name = f"{modules[node]}/{node.name or f'{node.op_type}_{i}'}".removeprefix("/")
        if origin is not None:
            known[node.name] = origin["bwcache_node"]
            region |= {node.name: origin["bwcache_node"]} if origin[REGION_MARK] else {}
    return region, known, unmarked


def _masked_select(values: Any, mask: Any) -> Any:
    """Translate `aten.masked_select`, which models pack text with and torch.onnx does not support."""
    import onnxscript

    op: Any = onnxscript.opset18
    wide = op.Expand(values, op.Shape(mask))
    return op.Compress(wide, op.Reshape(op.Expand(mask, op.Shape(wide)), [-1]))


def _int_mm(left: Any, right: Any) -> Any:
    """Translate `aten._int_mm`, the product of int8 matrices in int32 that quantized activations use and torch.onnx does not support."""
    import onnxscript

    op: Any = onnxscript.opset18
    return op.MatMulInteger(left, right)


def onnx_graph(plain: PlainGraph, opset: int, shapes: Mapping[str, Sequence[int | str]]) -> OnnxGraph:
    """Write one graph as an ONNX model; `shapes` are those of its inputs and outputs.

    Raises:
        ExportError: torch.onnx does not take the graph.
    """
    try:
        with tracing("torch.onnx", "onnxscript", "onnx_ir"):
            legalize(plain.exported, opset)
            exported = complex_as_pairs(plain.exported)
            lacking: Any = {torch.ops.aten.masked_select.default: _masked_select, torch.ops.aten._int_mm.default: _int_mm}
            program = torch.onnx.export(
                exported, (), dynamo=True, opset_version=opset, verbose=False, optimize=False, custom_translation_table=lacking
            )
            assert program is not None
            model: Any = program.model
            rewrites.simplify(model)
            rewrites.store_transposed(model)
    except ExportError:
        raise
    except Exception as error:  # the layers of torch.onnx raise errors of their own types
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = f"{type(cause).__name__}: {first_line(cause)}"
        raise ExportError(f"torch.onnx cannot export the {plain.kind} graph at opset {opset}: {reason}\n  {OTHERWISE}") from error
    rewrites.without_bool_where(model.graph)
    between_casts(model, lambda node: not admits_dtypes(node, opset))
    region, origins, unmarked = _name_operators(model, _origins(program))
    rewrites.strip(model)
    rewrites.rename(model.graph, plain.inputs, plain.outputs)
    rewrites.declare(model, shapes)
    model.graph.name = plain.kind
    return OnnxGraph(plain.kind, model, region, origins, unmarked)


def save(graph: OnnxGraph, path: Path, weights: WeightFile) -> None:
    """Write a model beside its weight file, check it, and infer its shapes.

    Raises:
        ExportError: onnx's own checker objects.
    """
    import onnx
    import onnx_ir as ir

    graphs: Any = graph.model.graphs()
    for inner in graphs:
        for value in inner.initializers.values():
            tensor = value.const_value
            if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.nbytes <= rewrites.SMALL:
                continue
            data, raw = tensor.tobytes(), getattr(tensor, "raw", None)
            offset = weights.place(data, value.name or "", raw if isinstance(raw, torch.Tensor) else None)
            value.const_value = ir.ExternalTensor(
                weights.path.name, offset, len(data), tensor.dtype, shape=tensor.shape, name=value.name or "", base_dir=str(path.parent)
            )
    ir.save(graph.model, path)
    weights.flush()
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"onnx.checker rejected the {graph.kind} graph: {first_line(error)}\n  {OTHERWISE}") from error


def guarded_graph(folder: Path, io: GraphIO, measured: int) -> OnnxGraph:
    """Return the guarded graph over the written pair; see `guarded_model`."""
    from bwcache_compile.exporters.onnx.guard import guarded_model

    return OnnxGraph("guarded", guarded_model(folder, io, measured), {}, {}, 0)
