"""Which names and numbers of a manifest must agree, each of them well formed by itself. Needs no torch."""

from __future__ import annotations

import typing
from collections.abc import Collection
from typing import Any

from bwcache_compile.bundle.manifest import Constant, GraphEntry, Manifest
from bwcache_compile.graph_io import REUSE_LEFT, UNTIL, cache_out

_DEEPEST = 50


def _invalid_form(form: Any, names: Collection[str], depth: int = 0) -> str | None:
    """Say what `put_together` could not put together of tensors with these names."""
    shown = f"invalid output structure {repr(form)[:60]}"
    if not isinstance(form, dict) or len(form) != 1 or depth > _DEEPEST:
        return shown
    ((kind, inside),) = form.items()
    if kind in ("tensor", "value"):
        fits = inside in names if kind == "tensor" else type(inside) in typing.get_args(Constant)
        return None if fits else shown
    if type(inside) is not {"tuple": list, "list": list, "mapping": dict}.get(kind):
        return shown
    parts = inside.values() if isinstance(inside, dict) else inside
    return next((found for part in parts if (found := _invalid_form(part, names, depth + 1))), None)


def disagreement(manifest: Manifest) -> str | None:
    """Say which names or numbers contradict one another; None where none do. Shapes, files and graphs are looked at elsewhere."""
    outputs = manifest.outputs
    for group, entries in (("inputs", manifest.inputs), ("outputs", outputs.items), ("slots", manifest.slots)):
        names = [entry.name for entry in entries]
        if len(set(names)) < len(names):
            return f"duplicate name {next(name for name in names if names.count(name) > 1)} in {group}"
    wrong = _invalid_form(outputs.form, [item.name for item in outputs.items])
    if wrong is not None or not outputs.items:
        return wrong or "there are no outputs"
    known = {entry.name: entry.dtype for entry in manifest.inputs}
    for entry in manifest.values:
        if known.get(entry.input, "bfloat16") == "bfloat16":  # numpy reads none
            return f"values lists {entry.input}, which is not an input or has dtype bfloat16"
    for symbol in manifest.symbols:
        if symbol.input not in known or symbol.dimension < 0 or symbol.factor < 1:
            return f"invalid symbol {symbol.name}: input {symbol.input}, dimension {symbol.dimension}, factor {symbol.factor}"
    return None


def missing_outputs(manifest: Manifest, kind: str) -> list[str]:
    """Return what a session reads of a graph's outputs that it does not make."""
    needed = [item.name for item in manifest.outputs.items]
    if kind != "reuse":
        needed += [cache_out(slot.name) for slot in manifest.slots]
    needed += {"compute": [REUSE_LEFT], "guarded": [cache_out(UNTIL)]}.get(kind, [])
    return [name for name in needed if name not in manifest.graphs[kind].outputs]


def sequence_fault(entry: GraphEntry) -> str | None:
    """Say what the calls of a sequence read that there is not, or return that there is already; None where all is in order."""
    assert entry.sequence is not None
    known = set(entry.inputs)
    for i, call in enumerate(entry.sequence.calls):
        unknown = next((name for name in call.inputs if name not in known), None)
        if unknown is not None:
            return f"call {i} reads {unknown}, which is not an input and which no earlier call returns"
        for name in call.outputs:
            if name in known:
                return f"call {i} returns {name}, which there is already"
            known.add(name)
    unknown = next((name for name in entry.sequence.returned if name not in known), None)
    if unknown is not None:
        return f"it returns {unknown}, which is not an input and which no call returns"
    if len(entry.sequence.returned) != len(entry.outputs):
        return f"it returns {len(entry.sequence.returned)} values, but lists {len(entry.outputs)} outputs"
    return None
