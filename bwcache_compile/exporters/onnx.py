"""Plain graphs to ONNX models: stable names, no metadata, every weight once in one file beside them."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bwcache_compile.errors import ExportError, first_line
from bwcache_compile.exporters.complex_pairs import complex_as_pairs
from bwcache_compile.exporters.fit import fit
from bwcache_compile.exporters.graphs import PlainGraph
from bwcache_compile.exporters.weights import WeightFile
from bwcache_compile.program import REGION_MARK

if TYPE_CHECKING:
    import onnx_ir as ir

OPSETS = range(18, 25)
_SMALL = 1024
"""Bytes up to which a constant stays in its graph: shapes must be there for shape inference."""
_FX_NODE = "pkg.torch.onnx.fx_node"


@dataclasses.dataclass(frozen=True)
class OnnxGraph:
    """One graph as an ONNX model that still holds its weights in memory.

    Attributes:
        kind: `compute`, `reuse` or `guarded`.
        model: The model.
        region: Of each operator that came from the cached region: its name here, and the node it was.
        unmarked: How many operators the exporter made without saying from what: folded constants, fused patterns.
    """

    kind: str
    model: ir.Model
    region: dict[str, str]
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


def _find_region(model: ir.Model, origins: dict[str, dict[str, Any]]) -> tuple[dict[str, str], int]:
    """Tell which operators are the region's, and put the module that each came from before its name: `blocks.0.attn/MatMul_3`.

    What a fusion made takes the module of what it reads. Names are what a runtime's messages, profiles and viewers show.
    """
    region, unmarked = {}, 0
    modules: dict[Any, str] = {}
    for i, node in enumerate(model.graph.all_nodes()):
        printed = str(node.metadata_props.get(_FX_NODE, ""))
        origin = origins.get(printed.split(" ", 1)[0].removeprefix("%"))
        unmarked += origin is None
        nearest = next((modules[value.producer()] for value in node.inputs if value is not None and value.producer() in modules), "")
        modules[node] = nearest if origin is None else origin["bwcache_module"]
        node.name = f"{modules[node]}/{node.name or f'{node.op_type}_{i}'}".removeprefix("/")
        if origin is not None and origin[REGION_MARK]:
            region[node.name] = origin["bwcache_node"]
    return region, unmarked


def _graphs(model: ir.Model) -> Iterator[Any]:
    yield from model.graphs()


def _strip(model: ir.Model) -> None:
    """Take away stack traces and whatever else speaks of the machine that exported."""
    model.metadata_props.clear()
    model.doc_string = None
    for graph in _graphs(model):
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


def _copied_output(graph: Any, value: Any) -> Any:
    """Return a value of its own for an output that is an input, a weight or another output already."""
    import onnx_ir as ir

    node = ir.node("Identity", [value])
    graph.append(node)
    copy = node.outputs[0]
    copy.shape, copy.type = value.shape, value.type
    return copy


def _rename(graph: Any, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
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
    return False if any(value.const_value.nbytes > _SMALL for value in weights) else None


def _simplify(model: ir.Model) -> None:
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


def _without_bool_where(graph: Any) -> None:
    """Choose between flags by logic: ONNX Runtime has no `Where` on bool, which `masked_fill` of a mask becomes."""
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


def _store_transposed(model: ir.Model) -> None:
    """Store each weight that is only read transposed as it is read, under the name `weight.T`.

    onnxruntime would do so when it opens the model, and hold both copies meanwhile; in an `If` it keeps both.
    """
    import onnx_ir as ir

    for value in list(model.graph.initializers.values()):
        raw: Any = getattr(value.const_value, "raw", None)
        users: list[Any] = [use.node for use in value.uses()]
        if not isinstance(raw, torch.Tensor) or raw.nbytes <= _SMALL or [node.op_type for node in users] != ["Transpose"]:
            continue
        (node,) = users
        order = node.attributes.get_ints("perm", tuple(reversed(range(raw.dim()))))
        stored = ir.tensor_adapters.TorchTensor(raw.permute(*order), f"{value.name}.T")
        transposed = ir.Value(name=stored.name, shape=ir.Shape(stored.shape), type=value.type, const_value=stored)
        model.graph.register_initializer(transposed)
        ir.convenience.replace_all_uses_with(node.outputs[0], transposed, replace_graph_outputs=True)
        node.graph.remove(node, safe=True)
        del model.graph.initializers[str(value.name)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's advice to its own developers to itself."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _declare(model: ir.Model, shapes: dict[str, list[int | str]]) -> None:
    """Write the shapes of inputs and outputs as the program knows them, and none inside where sizes are open.

    While it decomposes, torch asks its solver, which answers for the size at hand: what it notes down may be too narrow.
    """
    import onnx_ir as ir

    if any(isinstance(size, str) for shape in shapes.values() for size in shape):
        for graph in _graphs(model):
            for node in graph:
                for value in node.outputs:
                    value.shape = None
    for value in [*model.graph.inputs, *model.graph.outputs]:
        value.shape = ir.Shape(shapes[str(value.name)])


def onnx_graph(plain: PlainGraph, opset: int, shapes: dict[str, list[int | str]]) -> OnnxGraph:
    """Write one graph as an ONNX model; `shapes` are those of its inputs and outputs.

    Raises:
        ExportError: torch.onnx does not take the graph.
    """
    try:
        with _quiet():
            fit(plain.exported, opset)
            exported = complex_as_pairs(plain.exported)
            program = torch.onnx.export(exported, (), dynamo=True, opset_version=opset, verbose=False, optimize=False)
            assert program is not None
            model: Any = program.model
            _simplify(model)
            _store_transposed(model)
    except ExportError:
        raise
    except Exception as error:  # every front end raises its own kinds
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = f"{type(cause).__name__}: {first_line(cause)}"
        raise ExportError(f"torch.onnx does not take the {plain.kind} graph at opset {opset}: {reason}") from error
    _without_bool_where(model.graph)
    region, unmarked = _find_region(model, _origins(program))
    _strip(model)
    _rename(model.graph, plain.inputs, plain.outputs)
    _declare(model, shapes)
    model.graph.name = plain.kind
    return OnnxGraph(plain.kind, model, region, unmarked)


def save(graph: OnnxGraph, path: Path, weights: WeightFile) -> None:
    """Write a model beside its weight file, check it, and infer its shapes.

    Raises:
        ExportError: onnx's own checker objects.
    """
    import onnx
    import onnx_ir as ir

    for inner in _graphs(graph.model):
        for value in inner.initializers.values():
            tensor = value.const_value
            if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.nbytes <= _SMALL:
                continue
            data = tensor.tobytes()
            offset = weights.place(data)
            value.const_value = ir.ExternalTensor(
                weights.path.name, offset, len(data), tensor.dtype, shape=tensor.shape, name=value.name or "", base_dir=str(path.parent)
            )
    ir.save(graph.model, path)
    weights.flush()
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"onnx.checker objects to the {graph.kind} graph: {first_line(error)}") from error


def guarded_graph(folder: Path, slots: list[str], outputs: list[str], measured: int) -> OnnxGraph:
    """Return the guarded graph over the written pair; see `guarded_model`."""
    from bwcache_compile.exporters.guard import guarded_model

    return OnnxGraph("guarded", guarded_model(folder, slots, outputs, measured), {}, 0)
