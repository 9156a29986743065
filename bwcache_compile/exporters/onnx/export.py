"""Export a cached program as a bundle of ONNX graphs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bwcache_compile.bundle.files import Bundle
from bwcache_compile.bundle.load import ort_session
from bwcache_compile.bundle.manifest import GraphEntry, Manifest
from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import ConfigError, ExportError
from bwcache_compile.exporters.check import check_runs, check_structure, tolerance_of
from bwcache_compile.exporters.describe import declared_shapes, describe
from bwcache_compile.exporters.finish import finished
from bwcache_compile.exporters.graphs import PlainGraph, plain_graph
from bwcache_compile.exporters.onnx import lower as writer
from bwcache_compile.exporters.onnx.first_difference import Comparison, explain_difference
from bwcache_compile.exporters.onnx.stand_in import computes_in_half, stand_in
from bwcache_compile.exporters.refuse import refuse
from bwcache_compile.exporters.weights import WEIGHTS, WeightFile
from bwcache_compile.exporters.write import new_bundle
from bwcache_compile.graph_io import guarded_io
from bwcache_compile.ir.program import ModelProgram


def _need_onnx() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(name)
        except ModuleNotFoundError as error:
            raise ExportError(f'export needs {name}: pip install "bwcache-compile[onnx]".') from error


def export_onnx(
    program: ModelProgram,
    config: CacheConfig,
    directory: str | Path,
    parameters: tuple[str, ...],
    *,
    guarded: bool = False,
    opset: int = 20,
    repro: Path | None = None,
    left_out: Mapping[str, torch.Tensor] | None = None,
) -> Manifest:
    """Write a program as a bundle of ONNX graphs, and check it against torch before it takes its place.

    Args:
        program: With both graphs, `compute` and `reuse`.
        config: The settings that the bundle starts with.
        directory: A bundle there is replaced at the end; anything else is left alone.
        parameters: Names of the parameters of the model's forward, in order.
        guarded: Write `guarded.onnx` too: one graph with an `If`.
        opset: ONNX operator set; from 23 on attention is one operator.
        repro: Where the first operator goes that differs from torch, if one does.
        left_out: See `finished`.

    Returns:
        The manifest.

    Raises:
        ExportError: The program cannot be exported, or what was written computes something else.
        ConfigError: The operator set is not supported.
    """
    _need_onnx()
    if type(opset) is not int or opset not in writer.OPSETS:
        raise ConfigError(f"opset must be from {writer.OPSETS.start} to {writer.OPSETS.stop - 1}, got {opset!r}.")
    refuse(program, config)
    manifest = describe(program, config, parameters, graph_format="onnx", opset=opset)
    shapes = declared_shapes(manifest)
    plain: dict[str, PlainGraph] = {}
    with new_bundle(directory) as folder:
        written, graphs = {}, {}
        with WeightFile(folder / WEIGHTS) as weights:
            for kind in ("compute", "reuse"):
                plain[kind] = plain_graph(program, kind)
                written[kind] = writer.onnx_graph(plain[kind], opset, shapes)
                writer.save(written[kind], folder / f"{kind}.onnx", weights)
            report = check_structure(plain, written)
            if guarded:
                io = guarded_io(program.io("compute"), program.io("reuse"))
                written["guarded"] = writer.guarded_graph(folder, io, len(manifest.measured))
                writer.save(written["guarded"], folder / "guarded.onnx", weights)
        for kind, graph in written.items():
            values = (graph.model.graph.inputs, graph.model.graph.outputs)
            inputs, returned = (tuple(str(value.name) for value in group) for group in values)
            graphs[kind] = GraphEntry(file=f"{kind}.onnx", inputs=inputs, outputs=returned)
        manifest = dataclasses.replace(manifest, graphs=graphs)
        half = any(computes_in_half(graph.model) for graph in written.values())
        report |= _check_onnx(program, config, Bundle(folder, manifest), half, written, repro)
        return finished(dataclasses.replace(manifest, self_check=report), weights, left_out)


def _check_onnx(
    program: ModelProgram,
    config: CacheConfig,
    bundle: Bundle,
    half: bool,
    written: Mapping[str, writer.OnnxGraph],
    repro: Path | None,
) -> dict[str, Any]:
    """Check the graphs in ONNX Runtime; bfloat16 graphs run with casts to float32, since the CPU provider lacks bfloat16 kernels."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.add_session_config_entry(
        "session.disable_prepacking", "1"
    )  # weights stay mapped from the file, without a second copy beside torch's
    report: dict[str, Any] = {}
    if half:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it would fold casts of weights
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # a weight in float32 is freed once it was multiplied
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED  # a weight is cast where it is used, not all of them at first
        bundle = stand_in(bundle)
        report["stand_in"] = (
            "operators on bfloat16 ran in float32 between casts: ONNX Runtime's CPU provider has no bfloat16 matrix product;"
            " the CUDA provider and TensorRT have"
        )
    kinds = {"pair": "compute", "guarded": "guarded"}
    sessions = {
        name: functools.partial(ort_session, bundle, guarded=name == "guarded", options=options)
        for name, graph in kinds.items()
        if graph in bundle.manifest.graphs
    }
    tolerance, to_session = tolerance_of(program), functools.partial(_to_session, widened=half)

    def explain(kind: str, values: Mapping[str, Any]) -> str:
        compared = Comparison(program, kind, bundle, written[kind].origins, values, to_session, options, tolerance)
        return explain_difference(compared, repro)

    report |= check_runs(program, config, bundle.manifest, sessions, tolerance, to_session, explain)
    for path in bundle.folder.glob("stand_in.*"):
        path.unlink()
    return report


def _to_session(tensor: torch.Tensor, widened: bool) -> Any:
    """Return a tensor as a session takes it. numpy lacks bfloat16: such a tensor stays torch's, or is float32 for a stand-in."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16 and not widened:
        return tensor
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
