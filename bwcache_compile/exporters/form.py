"""What a manifest must look like: the kind of every value that a session reads, and the names that must agree. Needs no torch."""

from __future__ import annotations

from types import NoneType
from typing import Any

from bwcache_compile.graph_io import REUSE_LEFT, UNTIL, cache_out

_TENSOR = {"name": str, "dtype": str, "shape": [(int, str)]}
_PLACE = {"argument": str, "path": [(int, str)]}
_CONSTANT = (bool, int, float, str, NoneType)
_FORM = {
    "model": str,
    "graph_format": str,
    "opset": (int, NoneType),
    "arguments": [str],
    "inputs": [{**_TENSOR, **_PLACE}],
    "constants": [{**_PLACE, "value": _CONSTANT}],
    "values": [{"input": str, "value": [(bool, int, float)]}],
    "outputs": {"form": {}, "items": [_TENSOR]},
    "symbols": [{"name": str, "input": str, "dimension": int, "factor": int, "offset": int}],
    "conditions": [str],
    "slots": [{**_TENSOR, "fill": (int, float, str)}],
    "measured": [str],
    "config": {},
    "graphs": {},
    "files": {},
}
_DEEPEST = 50
_KINDS = {bool: "a flag", int: "an integer", float: "a number", str: "text", NoneType: "null"}


def _misfit(value: Any, form: Any, place: str) -> str | None:
    """Say where a value leaves its form: a type, several, `[form of each item]`, or `{key: form}` with other keys allowed."""
    found = f"got {repr(value)[:60]}"
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return f"{place}: expected a table, {found}"
        missing = [key for key in form if key not in value]
        if missing:
            return f"{place}: {', '.join(missing)} is missing"
        inside = [(value[key], inner, f"{place}.{key}") for key, inner in form.items()]
    elif isinstance(form, list):
        if not isinstance(value, list):
            return f"{place}: expected a list, {found}"
        inside = [(item, form[0], f"{place}[{i}]") for i, item in enumerate(value)]
    else:
        known = form if isinstance(form, tuple) else (form,)
        return None if type(value) in known else f"{place}: expected {' or '.join(_KINDS[kind] for kind in known)}, {found}"
    return next((wrong for entry in inside if (wrong := _misfit(*entry))), None)


def _misput(form: Any, names: list[str], depth: int = 0) -> str | None:
    """Say what `put_together` could not put together of tensors with these names."""
    shown = f"the outputs are put together as {repr(form)[:60]}"
    if not isinstance(form, dict) or len(form) != 1 or depth > _DEEPEST:
        return shown
    ((kind, inside),) = form.items()
    if kind in ("tensor", "value"):
        fits = inside in names if kind == "tensor" else type(inside) in _CONSTANT
        return None if fits else shown
    if type(inside) is not {"tuple": list, "list": list, "mapping": dict}.get(kind):
        return shown
    parts = inside.values() if isinstance(inside, dict) else inside
    return next((found for part in parts if (found := _misput(part, names, depth + 1))), None)


def _disagreement(manifest: dict[str, Any]) -> str | None:
    """Say which names or numbers contradict one another."""
    outputs = manifest["outputs"]
    for group, entries in (("inputs", manifest["inputs"]), ("outputs", outputs["items"]), ("slots", manifest["slots"])):
        names = [entry["name"] for entry in entries]
        if len(set(names)) < len(names):
            return f"{group} names {next(name for name in names if names.count(name) > 1)} twice"
    for slot in manifest["slots"]:
        if isinstance(slot["fill"], str) and slot["fill"] not in ("inf", "-inf", "nan"):
            return f"the slot {slot['name']} is filled with {slot['fill']!r}"
    wrong = _misput(outputs["form"], [item["name"] for item in outputs["items"]])
    if wrong is not None or not outputs["items"]:
        return wrong or "there are no outputs"
    known = {entry["name"]: entry["dtype"] for entry in manifest["inputs"]}
    for entry in manifest["values"]:
        if known.get(entry["input"], "bfloat16") == "bfloat16":  # numpy reads none
            return f"values are built in for {entry['input']}, which is no input, or of bfloat16"
    for symbol in manifest["symbols"]:
        if symbol["input"] not in known or symbol["dimension"] < 0 or symbol["factor"] < 1:
            return f"the symbol {symbol['name']} is read from {symbol['input']}, dimension {symbol['dimension']}, in {symbol['factor']}s"
    return None


def misfit(manifest: dict[str, Any]) -> str | None:
    """Say what is wrong with a manifest; None where nothing is. Shapes, files and graphs are looked at elsewhere."""
    return _misfit(manifest, _FORM, "manifest") or _disagreement(manifest)


def unmade(manifest: dict[str, Any], kind: str, returned: list[str]) -> list[str]:
    """Return what a session reads of a graph's outputs that it does not make."""
    needed = [item["name"] for item in manifest["outputs"]["items"]]
    if kind != "reuse":
        needed += [cache_out(slot["name"]) for slot in manifest["slots"]]
    needed += {"compute": [REUSE_LEFT], "guarded": [cache_out(UNTIL)]}.get(kind, [])
    return [name for name in needed if name not in returned]
