"""Build one ONNX graph that contains the guard, an `If`, from the compute and the reuse graph.

`onnx.compose` joins graphs one after the other; it does not make two graphs the branches of an `If` that share weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bwcache_compile.graph_io import INDICATOR, REUSE_LEFT, STEP, UNTIL, GraphIO, cache_in, cache_out

if TYPE_CHECKING:
    import onnx_ir as ir


def _like(value: Any, name: str) -> Any:
    import onnx_ir as ir

    return ir.Value(name=name, shape=value.shape, type=value.type)


def _arm(model: ir.Model, prefix: str, outer: dict[str, Any], weights: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Return a graph's operators, which read the inputs in `outer` and share `weights` from now on, and its outputs by name."""
    import onnx_ir as ir

    graph = model.graph
    outputs = {str(value.name): value for value in graph.outputs}
    for value in graph.inputs:
        ir.convenience.replace_all_uses_with(value, outer[str(value.name)], replace_graph_outputs=True)
    for name, value in list(graph.initializers.items()):
        shared = weights.get(name)
        if shared is None or not _same(shared.const_value, value.const_value):
            key = name if shared is None else f"{prefix}.{name}"
            shared = weights[key] = ir.Value(name=key, shape=value.shape, type=value.type, const_value=value.const_value)
        ir.convenience.replace_all_uses_with(value, shared, replace_graph_outputs=True)
    nodes = list(graph)
    for node in graph.all_nodes():
        node.name = f"{prefix}.{node.name}"
        for value in node.outputs:
            value.name = f"{prefix}.{value.name}"
    graph.outputs.clear()
    graph.remove(nodes)
    return nodes, outputs


def _same(a: Any, b: Any) -> bool:
    """Whether two weights are the same bytes of the same file, or equal small constants."""
    if hasattr(a, "offset") and hasattr(b, "offset"):
        return (a.offset, a.length, a.dtype, tuple(a.shape)) == (b.offset, b.length, b.dtype, tuple(b.shape))
    if hasattr(a, "offset") or hasattr(b, "offset"):
        return False
    return a.dtype == b.dtype and tuple(a.shape) == tuple(b.shape) and a.tobytes() == b.tobytes()


def guarded_model(folder: Path, io: GraphIO, measured: int) -> ir.Model:
    """Return a model with one `If`: the reuse graph where the step is not past `cache_in.reuse_until`, else the compute graph.

    It takes and returns what `io` says, without what is no tensor. `indicator` holds `measured` numbers, all NaN on a reused
    step. Weights stand outside of both arms, and the prologue and the epilogue in each.
    """
    import onnx_ir as ir

    compute, reuse = ir.load(folder / "compute.onnx"), ir.load(folder / "reuse.onnx")
    known = {str(value.name): value for value in [*reuse.graph.inputs, *compute.graph.inputs, *compute.graph.outputs]}
    known |= {name(UNTIL): known[STEP] for name in (cache_in, cache_out)}
    known |= {cache_in(slot): known[cache_out(slot)] for slot in io.written if cache_in(slot) not in known}
    outer = {name: _like(known[name], name) for name in io.inputs if name in known}
    returned = [name for name in io.outputs if name in known]
    shapes = {name: _like(known[name], name) for name in returned}
    weights: dict[str, Any] = {}
    arms = {}
    for kind, model in (("reuse", reuse), ("compute", compute)):
        nodes, results = _arm(model, kind, outer, weights)
        if kind == "compute":
            nodes.append(ir.node("Add", [outer[STEP], results[REUSE_LEFT]]))
            results[cache_out(UNTIL)] = nodes[-1].outputs[0]
        else:
            for slot in io.written:
                nodes.append(ir.node("Identity", [outer[cache_in(slot)]]))
                results[cache_out(slot)] = nodes[-1].outputs[0]
            if INDICATOR in io.measures:
                nothing = ir.tensor(np.full(measured, np.nan, dtype=np.float32))
                nodes.append(ir.node("Constant", [], attributes={"value": nothing}))
                results[INDICATOR] = nodes[-1].outputs[0]
        for name in returned:
            results[name].name = f"{kind}.{name}"
            results[name].shape, results[name].type = shapes[name].shape, shapes[name].type
        arms[kind] = ir.Graph([], [results[name] for name in returned], nodes=nodes, name=kind)

    within = ir.node("LessOrEqual", [outer[STEP], outer[cache_in(UNTIL)]], name="within")
    reuses = ir.node("Squeeze", [within.outputs[0]], name="reuses")
    within.outputs[0].name, reuses.outputs[0].name = "within", "reuses"
    attributes = {"then_branch": arms["reuse"], "else_branch": arms["compute"]}
    guard = ir.node("If", [reuses.outputs[0]], attributes=attributes, num_outputs=len(returned), name="guard")
    for name, value in zip(returned, guard.outputs, strict=True):
        value.name, value.shape, value.type = name, shapes[name].shape, shapes[name].type
    graph = ir.Graph(
        list(outer.values()),
        list(guard.outputs),
        nodes=[within, reuses, guard],
        initializers=list(weights.values()),
        opset_imports=dict(compute.graph.opset_imports),
        name="guarded",
    )
    return ir.Model(graph, ir_version=compute.ir_version)
