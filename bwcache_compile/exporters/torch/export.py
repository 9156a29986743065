"""Export a cached program as a bundle of torch's own files."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from bwcache_compile.bundle.files import Bundle
from bwcache_compile.bundle.load import torch_session
from bwcache_compile.bundle.manifest import GraphEntry, Manifest, WeightsEntry
from bwcache_compile.config import CacheConfig
from bwcache_compile.exporters.check import Written, check_runs, check_structure, tolerance_of
from bwcache_compile.exporters.describe import check_sizes, describe, with_layout
from bwcache_compile.exporters.finish import finished
from bwcache_compile.exporters.graphs import plain_graph
from bwcache_compile.exporters.refuse import refuse
from bwcache_compile.exporters.torch import package as writer
from bwcache_compile.exporters.torch.sequence import write_sequence
from bwcache_compile.exporters.weights import WEIGHTS, WeightFile
from bwcache_compile.exporters.write import new_bundle
from bwcache_compile.ir.program import ModelProgram


def export_torch(
    program: ModelProgram,
    config: CacheConfig,
    directory: str | Path,
    parameters: tuple[str, ...],
    *,
    compiled: bool,
    outlined: ModelProgram | None = None,
    left_out: Mapping[str, Tensor] | None = None,
) -> Manifest:
    """Write a program as a bundle of torch's own files, and check it against torch before it takes its place.

    Args:
        program: With both graphs, `compute` and `reuse`.
        config: The settings that the bundle starts with.
        directory: A bundle there is replaced at the end; anything else is left alone.
        parameters: Names of the parameters of the model's forward, in order.
        compiled: Write packages that AOTInductor compiled for this machine, instead of exported programs.
        outlined: The program with blocks that are calls of graphs which they share (`outline_blocks`): the compute graph is written as a
            sequence of packages, one for each of these graphs. None writes one package.
        left_out: See `finished`.

    Returns:
        The manifest.

    Raises:
        ExportError: The program cannot be exported, or what was written computes something else.
    """
    refuse(program, config)
    manifest = with_layout(describe(program, config, parameters, graph_format="aoti" if compiled else "pt2"), program)
    with new_bundle(directory) as folder:
        plain, graphs = {}, dict[str, GraphEntry]()
        written: dict[str, Written] = {}
        conditions: list[str] = []
        with WeightFile(folder / WEIGHTS) as weights:
            for kind in ("compute", "reuse"):
                plain[kind] = plain_graph(program, kind)
                if outlined is not None and kind == "compute":
                    sequence = written[kind] = write_sequence(outlined, folder, weights)
                    graphs[kind] = sequence.entry
                    conditions += sequence.conditions
                    continue
                path = folder / f"{kind}.pt2"
                graph = written[kind] = writer.save(writer.torch_graph(plain[kind]), path)
                if compiled:
                    conditions += writer.compile_package(graph, path)
                read = tuple(weights.add(name, tensor) for name, tensor in graph.tensors.items())
                inputs, returned = tuple(plain[kind].inputs), tuple(plain[kind].outputs)
                graphs[kind] = GraphEntry(file=path.name, inputs=inputs, outputs=returned, weights=read)
        check_sizes(program, conditions, [])
        report = check_structure(plain, written)
        manifest = dataclasses.replace(
            manifest,
            graphs=graphs,
            weights=WeightsEntry(file=WEIGHTS, tensors=weights.described),
            conditions=tuple(dict.fromkeys([*manifest.conditions, *conditions])),
        )
        tolerance = tolerance_of(program) if compiled else 0.0
        sessions = {"pair": functools.partial(torch_session, Bundle(folder, manifest))}
        report |= check_runs(program, config, manifest, sessions, tolerance, lambda tensor: tensor)
        return finished(dataclasses.replace(manifest, self_check=report), weights, left_out)
