"""Say of each operator what became of it, in the form that Model Explorer lays over a graph."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from torch import nn

from bwcache_compile.atomic_write import write_atomically
from bwcache_compile.errors import ConfigError
from bwcache_compile.html_report.data import searched
from bwcache_compile.html_report.operators import Part, placed_operators
from bwcache_compile.runtime import CachedModel

_GRAPH = "graph"
"""How Model Explorer names the graph of an exported program."""
_COLORS = {"always computed": "#d9d9d9", "reused": "#8fce9b"}
_GRADIENT = [{"stop": 0, "bgColor": "#ffffff"}, {"stop": 1, "bgColor": "#d1495b"}]


def write_node_data(folder: str | Path, cached: nn.Module) -> tuple[Path, ...]:
    """Write what is known of each operator as node data for Model Explorer.

    Open `compute.pt2` of a bundle (`export(cached, path, format="pt2")`) in Model Explorer and load the files as node data:
    `reuse.json` says of each operator whether a reused step runs it, `indicator.json` how much its block changed from step to step, on
    average over the last run of all contexts. The second one is written only where a run measured something. Operators are known by
    their names in the captured graph.

    Args:
        folder: Where to write; it is made where it is missing, and files of these names are replaced.
        cached: What `transform` returned, compiled or not, captured.

    Returns:
        The files.

    Raises:
        ConfigError: `cached` is no cached model.
        OSError: A file could not be written.
        StateError: Nothing is captured yet, or the model is closed.
    """
    model = getattr(cached, "_orig_mod", cached)  # what torch.compile returned of it
    if not isinstance(model, CachedModel):
        raise ConfigError(f"write_node_data expects the result of transform, got {type(cached).__name__}.")
    tidied, search = searched(model)
    placed = [(node.name, part) for node, part in placed_operators(tidied.compute.graph, search, model.plan)]
    cached_blocks = {block.name for block in model.plan.blocks}

    def state(part: Part) -> str:
        skipped = part == "between" or (isinstance(part, int) and search.blocks[part].name in cached_blocks)
        return "reused" if skipped else "always computed"

    found: dict[str, dict[str, Any]] = {
        "reuse.json": {"results": {name: {"value": state(part), "bgColor": _COLORS[state(part)]} for name, part in placed}}
    }
    changes = _changes(model)
    measured = {
        name: {"value": changes[block]} for name, part in placed if isinstance(part, int) and (block := search.blocks[part].name) in changes
    }
    if measured:
        found["indicator.json"] = {"results": measured, "gradient": _GRADIENT}
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, data in found.items():
        write_atomically(Path(folder) / name, json.dumps({_GRAPH: data}, indent=1) + "\n")
    return tuple(Path(folder) / name for name in found)


def _changes(model: CachedModel) -> dict[str, float]:
    """Return the mean change of each measured block, over the steps of all contexts that compared it with an earlier one."""
    report = model.report()
    rows: list[list[Any]] = [
        record.change.reshape(-1).tolist()
        for context in report.contexts.values()
        for record in context.steps
        if record.change is not None and record.gap is not None
    ]
    means = {}
    for place, block in enumerate(report.blocks):
        finite = [row[place] for row in rows if math.isfinite(row[place])]
        if finite:
            means[block] = statistics.fmean(finite)
    return means
