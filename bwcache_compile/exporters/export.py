"""From a cached program to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bwcache_compile.errors import ConfigError, ExportError
from bwcache_compile.exporters.bundle import new_bundle, open_bundle, write_manifest
from bwcache_compile.exporters.check import check_runs, check_structure
from bwcache_compile.exporters.describe import declared_shapes, describe, describe_outputs
from bwcache_compile.exporters.graphs import PlainGraph, plain_graph
from bwcache_compile.program import CachedProgram


def _need_onnx() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(name)
        except ModuleNotFoundError as error:
            raise ExportError(f'export needs {name}: pip install "bwcache-compile[onnx]".') from error


def _refuse(program: CachedProgram) -> None:
    """Say what cannot be exported before anything is done.

    Raises:
        ExportError: A guard per block, contexts that decide together, or a complex input.
    """
    config = program.planned().config
    if config.granularity == "block":
        raise ExportError("granularity='block' has as many guards as blocks, and a bundle has one. Transform with granularity='stack'.")
    if config.decide == "joint":
        raise ExportError("decide='joint' is decided between contexts by the host; a bundle's graphs see one. Use decide='separate'.")
    for node in program.compute.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dtype.is_complex:
            raise ExportError(
                f"the input {node.name} is {value.dtype}, and ONNX graphs take no complex inputs. Pass real and imaginary parts."
            )


def _output_names(program: CachedProgram, kind: str) -> tuple[str, ...]:
    plan = program.planned()
    users = tuple(item["name"] for item in describe_outputs(program)[0]["items"])
    if kind == "reuse":
        return users
    behind = ("reuse_left", *(("indicator",) if plan.measured else ()))
    return (*users, *(f"cache_out.{slot.name}" for slot in plan.slots), *behind)


def export_onnx(
    program: CachedProgram, directory: str | Path, parameters: tuple[str, ...], *, guarded: bool = False, opset: int = 20
) -> dict[str, Any]:
    """Write a program as a bundle of ONNX graphs, and check it against torch before it takes its place.

    Args:
        program: With both graphs, `compute` and `reuse`.
        directory: A bundle there is replaced at the end; anything else is left alone.
        parameters: Names of the parameters of the model's forward, in order.
        guarded: Write `guarded.onnx` too: one graph with an `If`.
        opset: ONNX operator set; from 23 on attention is one operator.

    Returns:
        The manifest.

    Raises:
        ExportError: The program cannot be exported, or what was written computes something else.
        ConfigError: The operator set is not supported.
    """
    from bwcache_compile.exporters import onnx as writer

    _need_onnx()
    if opset not in writer.OPSETS:
        raise ConfigError(f"opset is {opset!r}; choose one from {writer.OPSETS.start} to {writer.OPSETS.stop - 1}.")
    _refuse(program)
    content = describe(program, parameters, opset)
    shapes = declared_shapes(content)
    plain: dict[str, PlainGraph] = {}
    with new_bundle(directory) as folder:
        weights = writer.WeightFile(folder / writer.WEIGHTS)
        written, graphs = {}, {}
        try:
            for kind in ("compute", "reuse"):
                plain[kind] = plain_graph(program, kind, _output_names(program, kind))
                written[kind] = writer.onnx_graph(plain[kind], opset, shapes)
                writer.save(written[kind], folder / f"{kind}.onnx", weights)
            report = check_structure(plain, written)
            if guarded:
                slots, outputs = [slot["name"] for slot in content["slots"]], [item["name"] for item in content["outputs"]["items"]]
                written["guarded"] = writer.guarded_graph(folder, slots, outputs, len(content["measured"]))
                writer.save(written["guarded"], folder / "guarded.onnx", weights)
        finally:
            weights.close()
        for kind, graph in written.items():
            values = (graph.model.graph.inputs, graph.model.graph.outputs)
            inputs, returned = ([str(value.name) for value in group] for group in values)
            graphs[kind] = {"file": f"{kind}.onnx", "inputs": inputs, "outputs": returned}
        content["graphs"] = graphs
        kinds = ("pair", *(("guarded",) if guarded else ()))
        with torch.no_grad():
            content["self_check"] = {**report, **check_runs(program, folder, content, kinds)}
        write_manifest(folder, content)
        return open_bundle(folder).manifest
