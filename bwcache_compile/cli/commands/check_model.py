"""Check a bundle against the model that it was exported from, as the export did."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

import bwcache_compile as bw
from bwcache_compile.bundle.manifest import Manifest
from bwcache_compile.bundle.session import Session
from bwcache_compile.cli.models import loaded, transformed
from bwcache_compile.cli.named import Named
from bwcache_compile.cli.outcome import CommandError
from bwcache_compile.cli.screen import Screen
from bwcache_compile.cli.source import Source
from bwcache_compile.exporters.check import check_runs
from bwcache_compile.exporters.describe import describe


def _to_session(graph_format: str) -> Callable[[Tensor], Any]:
    """Return what turns one of torch's tensors into what a session of this format takes."""
    if graph_format != "onnx":
        return lambda tensor: tensor
    return lambda tensor: tensor.detach().cpu().numpy()


def _captured(screen: Screen, source: Source, manifest: Manifest) -> tuple[bw.CachedModel, Manifest]:
    """Capture the model with the bundle's settings, and with the sizes open that the bundle has open, where that can be had.

    Raises:
        CommandError: The model has other blocks, inputs or slots than the bundle.
    """

    def captured(dynamic: bool) -> tuple[bw.CachedModel, Manifest]:
        cached = transformed(screen, source, manifest.config, verify="close", dynamic_shapes="auto" if dynamic else None)
        names = cached.call_parameters
        return cached, describe(cached.program, manifest.config, names, graph_format=manifest.graph_format, opset=manifest.opset)

    cached, described = captured(bool(manifest.symbols))
    if {symbol.place for symbol in described.symbols} != {symbol.place for symbol in manifest.symbols}:
        cached, described = captured(False)
    for what in ("blocks", "inputs", "slots"):
        of_bundle, of_model = ([entry.name for entry in getattr(side, what)] for side in (manifest, described))
        if of_bundle != of_model:
            raise CommandError(
                f"the bundle was not exported from this {source.title}: its {what} are {', '.join(of_bundle)}, but the model's are"
                f" {', '.join(of_model)}"
            )
    return cached, described


def check_against_model(screen: Screen, manifest: Manifest, sessions: Mapping[str, Session], named: Named) -> dict[str, Any]:
    """Run the bundle beside the model in torch over several steps, both branches taken; return what was found.

    Raises:
        ExportError: A decision, an output or a slot differs.
        CommandError: The bundle is not of this model.
        StateError: The model's example inputs do not fit the bundle.
    """
    source = loaded(screen, named)
    cached, described = _captured(screen, source, manifest)
    tolerance = float(manifest.self_check.get("tolerance", 0.0))
    opened: dict[str, Callable[[], Session]] = {form: lambda session=session: session for form, session in sessions.items()}  # type: ignore[misc]
    with screen.progress("running the bundle beside the model"):
        return check_runs(cached.program, manifest.config, described, opened, tolerance, _to_session(manifest.graph_format))
