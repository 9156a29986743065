"""Gather everything that the report shows as plain data: dictionaries, lists, text and finite numbers."""

from __future__ import annotations

import base64
import dataclasses
import importlib.metadata
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from bwcache_compile import passes
from bwcache_compile.calibration import CalibrationPlan
from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import ConfigError
from bwcache_compile.html_report.operators import graph_parts
from bwcache_compile.ir.plan import BlockSearch, CachePlan
from bwcache_compile.ir.program import ModelProgram
from bwcache_compile.printing import plain
from bwcache_compile.report import ContextReport
from bwcache_compile.runtime import CachedModel

Image = bytes | str | Path
"""A picture: the bytes of a PNG, JPEG or WebP file, or its path."""

_KINDS = ((b"\x89PNG\r\n\x1a\n", 0, "png"), (b"\xff\xd8\xff", 0, "jpeg"), (b"WEBP", 8, "webp"))
"""What such a file holds at which place, and the name of its kind."""


def report_data(
    cached: nn.Module,
    *,
    plan: CalibrationPlan | None = None,
    images: Mapping[str, Image] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return everything that `write_report` shows, as plain data that `json.dumps` takes.

    Runs the passes once more on the captured graph, for their diffs; reads the indicator from the device. The model is not run.

    Args:
        cached: What `transform` returned, compiled or not, captured.
        plan: A calibration, whose frontier is shown.
        images: Pictures by caption, such as a contact sheet; the caption is also their text alternative.
        seconds: Times that were measured, by what was measured. A report of a run holds none.

    Raises:
        ConfigError: `cached` is no cached model, a time is not a finite number of seconds, or an image is no PNG, JPEG or WebP.
        OSError: An image could not be read.
        StateError: Nothing is captured yet, or the model is closed.
    """
    model = getattr(cached, "_orig_mod", cached)  # what torch.compile returned of it
    if not isinstance(model, CachedModel):
        raise ConfigError(f"a report requires the result of transform, got {type(cached).__name__}.")
    if wrong := [name for name, value in (seconds or {}).items() if not math.isfinite(value) or value < 0]:
        raise ConfigError(f"seconds[{wrong[0]!r}] must be a finite number of at least 0, got {(seconds or {})[wrong[0]]}.")
    cache, program, config = model.plan, model.program, model.cache_config
    tidied, search = searched(model)
    planned = cache.to_dict()
    for region in planned["regions"]:
        region["live_ins"] = [program.value(name) for name in region["live_ins"]]
        region["live_outs"] = [program.value(name) for name in region["live_outs"]]
    inputs = [value for value in map(program.value, program.signature.inputs) if value["shape"] is not None]
    return plain(
        {
            "model": _model(model.original, inputs),
            "guard": model.guard,
            "found": {**_found(search, cache, program), "parts": graph_parts(tidied.compute.graph, search, cache)},
            "plan": {**planned, "text": str(cache)},
            "passes": [{"name": name, **vars(diff)} for name, diff in model.graph_diff().items()],
            "run": _run(model, cache, config),
            "frontier": None if plan is None else plan.to_dict(),
            "images": [_image(caption, image) for caption, image in (images or {}).items()],
            "seconds": dict(seconds or {}),
            "settings": dataclasses.asdict(config),
            "versions": _versions(model.original),
        }
    )


def searched(model: CachedModel) -> tuple[ModelProgram, BlockSearch]:
    """Return the captured graph as blocks are searched in it, and what was found."""
    cache = model.plan
    tidied = passes.run_pipeline(model.program.fresh(), passes.TIDY_PIPELINE)
    # blocks that the user named were not searched for, so nothing was turned down either
    return tidied, BlockSearch(cache.blocks, (), chosen=True) if cache.work.chosen else passes.find_blocks(tidied)


def _model(model: nn.Module, inputs: list[dict[str, Any]]) -> dict[str, Any]:
    tensors = {id(parameter): parameter for parameter in model.parameters()}.values()
    return {
        "name": type(model).__name__,
        "module": type(model).__module__,
        "parameters": sum(tensor.numel() for tensor in tensors),
        "parameter_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "inputs": inputs,
    }


def _found(search: BlockSearch, cache: CachePlan, program: ModelProgram) -> dict[str, Any]:
    """Return the search; each block says whether it is cached and measured, and its live-outs have shapes."""
    found = search.to_dict()
    skipped, measured = {block.name for block in cache.blocks}, {probe.block for probe in cache.measured}
    for block in found["blocks"]:
        block["cached"], block["measured"] = block["name"] in skipped, block["name"] in measured
        block["live_outs"] = [program.value(name) for name in block["live_outs"]]
    return {**found, "chosen": search.chosen}


def _run(model: CachedModel, cache: CachePlan, config: CacheConfig) -> dict[str, Any]:
    """Return what each context did, the share of the model's work that it ran, and the weights of its reused steps."""
    report = model.report()
    run = report.to_dict()
    for name, context in report.contexts.items():
        run["contexts"][name]["weights"] = _weights(context, cache, config)
        run["contexts"][name]["work"] = _work(context, cache)
    anchors = cache.settings.anchors
    return {**run, "anchors": anchors, "weights": "last" if anchors == 1 else "rule" if config.weights is None else "table"}


def _weights(context: ContextReport, cache: CachePlan, config: CacheConfig) -> dict[int, tuple[float, ...]]:
    """Return the weights of the anchors at each reused step, the last computed step first, as far as the settings say them."""
    reused = [record.step for record in context.steps if not record.computed]
    if cache.settings.anchors == 1:
        return dict.fromkeys(reused, (1.0,))
    rows = dict(enumerate(config.weights or ()))
    return {step: row for step in reused if (row := rows.get(step)) is not None}


def _work(context: ContextReport, cache: CachePlan) -> float | None:
    """Return the share of the model's work that a generation ran; None with a guard per block, where it is not known."""
    if not context.steps or len(cache.regions) > 1:
        return None
    return (context.computed + context.reused * (1 - cache.work.cached)) / len(context.steps)


def _image(caption: str, image: Image) -> dict[str, str]:
    """Return a picture with its bytes in its address."""
    content = image if isinstance(image, bytes) else Path(image).read_bytes()
    for mark, place, kind in _KINDS:
        if content[place : place + len(mark)] == mark:
            return {"caption": caption, "address": f"data:image/{kind};base64,{base64.b64encode(content).decode()}"}
    raise ConfigError(f"images[{caption!r}] must be a PNG, JPEG or WebP file, got one that begins with {content[:8]!r}.")


def _versions(model: nn.Module) -> dict[str, str]:
    """Return the versions of what the figures depend on, the library of the model's class among them."""
    found = {"Python": platform.python_version()}
    for name in dict.fromkeys(("bwcache-compile", "torch", type(model).__module__.partition(".")[0])):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a script, or a source tree that is not installed
    return found
