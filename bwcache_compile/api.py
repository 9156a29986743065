"""The two calls most users need: `transform` and `find_blocks`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from bwcache_compile import passes
from bwcache_compile.bundle.files import FORMATS
from bwcache_compile.bundle.manifest import Manifest
from bwcache_compile.capture.capture import capture
from bwcache_compile.capture.flatten import flat_program
from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import ConfigError, ExportError, StateError
from bwcache_compile.exporters.onnx.export import export_onnx
from bwcache_compile.exporters.torch.export import export_torch
from bwcache_compile.ir.compare import Verify
from bwcache_compile.ir.graph_text import format_value
from bwcache_compile.ir.plan import BlockSearch
from bwcache_compile.ir.program import ModelProgram
from bwcache_compile.passes import Guard
from bwcache_compile.passes.specialize import specialize
from bwcache_compile.runtime import CachedModel, Toolchain
from bwcache_compile.runtime.hooks import refuse_hooks


def _names(blocks: Sequence[str] | None) -> tuple[str, ...]:
    if blocks is None:
        return ()
    if isinstance(blocks, str) or not blocks or not all(isinstance(name, str) for name in blocks):
        raise ConfigError(f'blocks must be a list of module paths, such as ["transformer_blocks"], got {blocks!r}.')
    return tuple(blocks)


def _toolchain(blocks: Sequence[str] | None, guard: Guard) -> Toolchain:
    choices: dict[str, Any] = {"blocks": _names(blocks), "guard": guard}
    build, explain = functools.partial(passes.build, **choices), functools.partial(passes.explain, **choices)
    return Toolchain(capture=capture, build=build, explain=explain, guard=guard)


def transform(
    model: nn.Module,
    config: CacheConfig | Mapping[str, Any] | None = None,
    *,
    blocks: Sequence[str] | None = None,
    guard: Guard = "host",
    example_args: tuple[Any, ...] | None = None,
    example_kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    verify: Verify = "bitwise",
    **settings: Any,
) -> CachedModel:
    """Return a drop-in for a diffusion transformer that reuses its blocks' outputs where they hardly change.

    The model is captured at the first call of each input signature, or at once for the examples given here. Its
    repeated blocks are found in the graph; no list of known models is consulted. Call `torch.compile` on the result,
    not on the model.

    A second call that differs from an earlier one in sizes alone (batch, frames, height, width, text length) is captured
    with dynamic sizes, and that program serves every size that its graph is proved for. It is compared with the model at each
    new size. Sizes that it is not proved for get programs of their own. A call at which a graph is compared costs two
    forwards, the model's and the graph's, whose result is the step's.

    Args:
        model: In evaluation mode by the time it is called. It is not changed, and its weights are not copied.
        config: What to cache and when to reuse it, as a `CacheConfig` or a dictionary of its settings. With no settings at all it is
            `CacheConfig.recommended()`, which needs no number of steps; single settings are on top of `CacheConfig()`, the paper's
            schedule with a compact indicator.
        blocks: Cache these instead of the blocks that are found: module paths (`"blocks.3"`), or the path of a stack
            (`"blocks"`). They must follow one another on one stream.
        guard: "host" picks one of two plain graphs at each step, and reads one number from the device per computed
            step. "graph" puts the choice into one graph with `torch.cond`: for one-file deployment, for
            `torch.compile(cached.functional_step, fullgraph=True)`, and for a guard per block.
        example_args: Positional arguments to capture now.
        example_kwargs: Keyword arguments to capture now.
        dynamic_shapes: Which sizes are open from the first capture on: "auto" for all that the model lets, else in the
            form of `torch.export.export`, where arguments that are left out have fixed sizes. None opens them when a
            second signature shows that they change.
        verify: How a captured graph is compared with the model before it is used, at its first call and at each new size.
            "bitwise" wants equal bits; "close" allows the rounding of the outputs' dtype (for models whose kernels change from
            run to run). False compares nothing, and a wrong capture goes unnoticed; the model still runs once before its first
            capture, because exporting a model that never ran can damage it.
        **settings: Single settings of `CacheConfig`, on top of `config`: `transform(model, threshold=0.1, num_steps=50)`.

    Returns:
        A module that is called like `model`, and returns what `model` returns.

    Raises:
        ConfigError: `model` is no module, is compiled already, or has offload hooks.
        StateError: `model` is a cached model already.
        CaptureError, NoBlocksFoundError, UnsupportedGraphError: With examples, what the first call would raise.
    """
    if isinstance(model, CachedModel):
        raise StateError("this model is already transformed. Use it as it is, or transform the original model again with other settings.")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"transform expects a torch.nn.Module, got {type(model).__name__}.")
    if hasattr(model, "_orig_mod"):
        raise ConfigError("this model is already compiled. Call transform on the original model, then torch.compile on the result.")
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise ConfigError(
            "this model was compiled in place with model.compile(). Call transform on the model before it is compiled, then compile the"
            " result."
        )
    refuse_hooks(model)
    config = CacheConfig.of(config, **settings) if config is not None or settings else CacheConfig.recommended()
    if guard not in get_args(Guard):
        raise ConfigError(f"guard must be one of {', '.join(map(repr, get_args(Guard)))}, got {guard!r}.")
    config.check_guard(guard)
    if verify not in get_args(Verify):
        raise ConfigError(f"verify must be one of {', '.join(map(repr, get_args(Verify)))}, got {verify!r}.")
    if isinstance(dynamic_shapes, str) and dynamic_shapes != "auto":
        raise ConfigError(f'dynamic_shapes must be "auto", None or what torch.export.export takes, got {dynamic_shapes!r}.')
    if not isinstance(example_args, (tuple, list, type(None))):
        raise ConfigError(f"example_args must be a tuple, such as (latents, timestep), got {type(example_args).__name__}.")
    cached = CachedModel(model, config, _toolchain(blocks, guard), dynamic_shapes, verify)
    if example_args is not None or example_kwargs is not None:
        cached.prepare(tuple(example_args or ()), example_kwargs or {})
    return cached


def find_blocks(
    model: nn.Module | ExportedProgram,
    *,
    blocks: Sequence[str] | None = None,
    example_args: tuple[Any, ...] = (),
    example_kwargs: dict[str, Any] | None = None,
) -> BlockSearch:
    """Return the repeated blocks of a model and every candidate that was turned down, with the reason.

    Args:
        model: In evaluation mode; or a program that `torch.export.export` made, or what `transform` returned and has captured, which
            need no examples.
        blocks: Look at these instead of searching; see `transform`.
        example_args: Positional arguments to capture with.
        example_kwargs: Keyword arguments to capture with.

    Raises:
        CaptureError: The model could not be captured.
        ConfigError: `blocks` names nothing in the model, or what cannot be a chain of blocks.
    """
    names = _names(blocks)
    if isinstance(model, ExportedProgram):
        program = flat_program(model, "the exported program")
    elif isinstance(model, CachedModel) and model.cached_programs and not (example_args or example_kwargs):
        program = model.program.fresh()
    else:
        program = capture(model, example_args, example_kwargs or {})
    return passes.find_blocks(passes.run_pipeline(program, passes.TIDY_PIPELINE), names)


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
    opset: int = 20,
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
        opset: ONNX operator set, for that format. 20 has attention in parts, 23 as one operator.
        repro: A new or empty folder. If the export is refused because numbers differ, the first operator that differs is written there
            with its inputs, torch's result, and a script that compares. ONNX only.

    Returns:
        The manifest: what the bundle is, with the report of the check in `self_check`.

    Raises:
        ExportError: There is no single program, it cannot be exported, or what was written differs from torch. Of an ONNX graph the
            message then lists the operators that differ first, with their modules.
        ConfigError: `format` or `opset` is not supported, or `cached` or `signature` is something else.
    """
    given, cached = cached, getattr(cached, "_orig_mod", cached)  # what torch.compile returned of it
    if not isinstance(cached, CachedModel):
        raise ConfigError(f"export expects the result of transform, got {type(given).__name__}.")
    if format not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(map(repr, FORMATS))}, got {format!r}.")
    if guarded and format != "onnx":
        raise ConfigError(f'guarded=True requires format="onnx", got {format!r}.')
    if repro is not None and format != "onnx":
        raise ConfigError(f'repro requires format="onnx", got {format!r}.')
    place = None if repro is None else Path(repro).resolve()
    if place is not None and place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise ConfigError(f"repro must be a new or empty folder, but {place} is a file or holds files.")
    program, config = _one_program(cached, signature), cached.cache_config
    with torch.autocast(program.planned().device.type, enabled=False):  # what is around this call is no part of the program
        if format != "onnx":
            return export_torch(program, config, directory, cached.call_parameters, compiled=format == "aoti")
        return export_onnx(program, config, directory, cached.call_parameters, guarded=guarded, opset=opset, repro=place)
