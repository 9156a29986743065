"""The call that writes a cached model as a bundle: `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bwcache_compile.bundle.files import FORMATS
from bwcache_compile.bundle.manifest import Manifest
from bwcache_compile.errors import ConfigError, ExportError
from bwcache_compile.exporters.onnx.export import export_onnx
from bwcache_compile.exporters.torch.export import export_torch
from bwcache_compile.exporters.weight_sources import plain_tensors
from bwcache_compile.ir.graph_text import format_value
from bwcache_compile.ir.program import ModelProgram
from bwcache_compile.opaque import OpaqueModel
from bwcache_compile.passes import outlined_copy
from bwcache_compile.passes.specialize import specialize
from bwcache_compile.region import RegionModel
from bwcache_compile.runtime import CachedModel


def _one_program(cached: CachedModel, signature: tuple[tuple[Any, ...], dict[str, Any]] | None) -> ModelProgram:
    """Return the program to export, its reuse graph made where the guard was in the graph.

    Raises:
        ExportError: There are several to choose from, or none.
        ConfigError: `signature` is no call.
    """
    if signature is not None:
        match signature:
            case (tuple() | list() as args, dict() as kwargs):
                cached.prepare(tuple(args), kwargs)
            case _:
                shown = ", ".join(type(part).__name__ for part in signature) if isinstance(signature, tuple) else type(signature).__name__
                raise ConfigError(
                    f"signature must be a pair (args, kwargs) of a tuple and a dict, such as ((latents, timestep), {{}}), got ({shown})."
                )
        program = cached.program
    else:
        held = cached.cached_programs
        if not held:
            raise ExportError(
                "there is no program to export: the model has not been captured yet, or it was changed or closed since.\n"
                "  Call the model once, or pass signature=(args, kwargs) with the arguments of a typical call."
            )
        if len(held) > 1:
            shapes = ["; ".join(f"{name} {shape}" for name, shape in _shapes(program)) for program in held]
            raise ExportError(
                f"the model has {len(held)} captured programs, but a bundle holds one:\n  "
                + "\n  ".join(shapes)
                + "\n  Pass signature=(args, kwargs) to choose one, or transform with dynamic_shapes so that one program serves all sizes."
            )
        program = held[0]
    if program.reuse is None and cached.cache_config.granularity == "stack":
        program = specialize(program).program
    return program


def _outlined(program: ModelProgram) -> ModelProgram:
    """Return a program whose blocks are calls of the graphs that they share.

    Raises:
        ExportError: No two blocks can share one.
    """
    result = outlined_copy(program)
    if not result.modified:
        reasons = [f"{block.name}: {result.left[block.name]}" for block in program.planned().blocks]
        raise ExportError(
            f"no two blocks of {program.model_name} can be compiled as one:\n  "
            + "\n  ".join(reasons)
            + "\n  Export with blocks_once=False, which compiles the graph into one package."
        )
    return result.program


def _shapes(program: ModelProgram) -> list[tuple[str, str]]:
    nodes = program.compute.graph.find_nodes(op="placeholder")[: len(program.signature.inputs)]
    return [(node.name, format_value(node.meta["val"])) for node in nodes if isinstance(node.meta.get("val"), Tensor)]


def export(
    cached: nn.Module,
    directory: str | Path,
    format: str = "onnx",
    *,
    signature: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
    guarded: bool = False,
    blocks_once: bool = False,
    opset: int = 20,
    include_weights: bool = True,
    repro: str | Path | None = None,
) -> Manifest:
    """Write a cached model as a bundle: graphs with the cache as inputs and outputs, one weight file, and a manifest.

    The bundle holds the settings in force now (`cached.cache_config`), not those of the capture. It is run beside torch before
    it takes its place: same decisions, outputs and cache over several steps with both branches taken. `load` opens it, in a
    process that needs no torch.

    Args:
        cached: What `transform` returned, compiled or not, captured for one signature.
        directory: Where to write. A bundle there is replaced at the end; a failure leaves it as it was. Nothing else is
            overwritten.
        format: "onnx"; "pt2" for exported programs of torch, which `load(..., backend="torch")` runs bit for bit as torch
            does; "aoti" for the same compiled by AOTInductor for this kind of machine, which needs a C++ compiler.
        signature: `(args, kwargs)` of a call, where the model holds several programs or none yet.
        guarded: Add one graph that decides by itself, with an `If`. ONNX only.
        blocks_once: Compile blocks that are alike once: the compute graph is a sequence of packages, one for each kind of block, called
            with the weights of each block in turn, and those for what stands around the blocks. What compiles and how much code there is
            no longer grow with the number of blocks. "aoti" only.
        opset: ONNX operator set, for that format. 20 has attention in parts, 23 as one operator.
        include_weights: False leaves the weight file out, once the bundle was checked with it: `add_weights` writes it from the model's own
            safetensors files. What is not in the model's `state_dict()` stays in the bundle.
        repro: A new or empty folder. If the export is refused because numbers differ, the first operator that differs is written there
            with its inputs, torch's result, and a script that compares. ONNX only.

    Returns:
        The manifest: what the bundle is, with the report of the check in `self_check`.

    Raises:
        ExportError: There is no single program, it cannot be exported, or what was written differs from torch. Of an ONNX graph the
            message then lists the operators that differ first, with their modules. Weights that are to be left out are quantized.
        ConfigError: `format` or `opset` is not supported, or `cached` or `signature` is something else.
    """
    given, cached = cached, getattr(cached, "_orig_mod", cached)  # what torch.compile returned of it
    if isinstance(cached, RegionModel):
        raise ConfigError(
            "export writes one graph of the whole model, and this one is captured by region. Each of its stacks can be exported:"
            " export(cached.stacks[name], directory)."
        )
    if isinstance(cached, OpaqueModel):
        raise ConfigError("export writes a graph of the model, and this one is captured as opaque: there is no graph.")
    if not isinstance(cached, CachedModel):
        raise ConfigError(f"export expects the result of transform, got {type(given).__name__}.")
    if cached.ranks is not None:
        raise ConfigError(
            "export writes graphs for one process, and this model decides over the ranks of a process group. Transform a model that is"
            " whole on this rank without process_group, and export that."
        )
    if format not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(map(repr, FORMATS))}, got {format!r}.")
    if guarded and format != "onnx":
        raise ConfigError(f'guarded=True requires format="onnx", got {format!r}.')
    if blocks_once and format != "aoti":
        raise ConfigError(f'blocks_once=True requires format="aoti", got {format!r}.')
    if repro is not None and format != "onnx":
        raise ConfigError(f'repro requires format="onnx", got {format!r}.')
    place = None if repro is None else Path(repro).resolve()
    if place is not None and place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise ConfigError(f"repro must be a new or empty folder, but {place} is a file or holds files.")
    program, config = _one_program(cached, signature), cached.cache_config
    left_out = None if include_weights else plain_tensors(cached.original.state_dict())
    with torch.autocast(program.planned().device.type, enabled=False):  # what is around this call is no part of the program
        if format != "onnx":
            outlined = _outlined(program) if blocks_once else None
            packages: dict[str, Any] = {"compiled": format == "aoti", "outlined": outlined, "left_out": left_out}
            return export_torch(program, config, directory, cached.call_parameters, **packages)
        settings: dict[str, Any] = {"guarded": guarded, "opset": opset, "repro": place, "left_out": left_out}
        return export_onnx(program, config, directory, cached.call_parameters, **settings)
