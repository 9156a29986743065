"""A call of a session: which input each argument is, which sizes it has, and how the outputs are put together. Needs no torch."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from bwcache_compile.errors import StateError
from bwcache_compile.exporters.arithmetic import arithmetic


class Output(dict[str, Any]):
    """What a model returns that names its outputs: `out.sample`, `out["sample"]` and `out[0]` are the same."""

    def __getattr__(self, name: str) -> Any:
        """Return an output by name."""
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error

    def __getitem__(self, key: Any) -> Any:
        """Return an output by name or position."""
        return list(self.values())[key] if isinstance(key, (int, slice)) else super().__getitem__(key)

    @staticmethod
    def put_together(described: dict[str, Any], values: dict[str, Any]) -> Any:
        """Return outputs in the form that the model returned."""
        items = described["items"]
        if described["kind"] == "tensor":
            return values[items[0]["name"]]
        if described["kind"] == "mapping":
            return Output({item["key"]: values[item["name"]] for item in items})
        positions = {item["position"]: values[item["name"]] for item in items}
        return tuple(positions.get(i) for i in range(described["length"]))


@dataclasses.dataclass(frozen=True)
class Call:
    """One call's tensors by input name, their shapes, and the values of the open sizes."""

    values: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    symbols: dict[str, int]

    def sizes_of(self, shape: list[int | str]) -> tuple[int, ...]:
        """Return a shape at this call's sizes."""
        return tuple(arithmetic(size, self.symbols) for size in shape)


def _value(given: Any, name: str, dtype: str) -> Any:
    """Return an input as an OrtValue; arrays that lie on the same device are not copied."""
    import onnxruntime as ort

    if isinstance(given, ort.OrtValue):
        return given
    if isinstance(given, (int, float, bool, list, tuple, np.generic)):
        given = np.asarray(given, dtype=dtype)
    if isinstance(given, np.ndarray):
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(given))
    if hasattr(given, "__dlpack__"):
        return ort.OrtValue.from_dlpack(given.contiguous() if hasattr(given, "contiguous") else given)
    raise StateError(f"{name} is a {type(given).__name__}; pass a numpy array, an OrtValue or something with DLPack.")


def _inside(given: Any, path: list[int | str], argument: str) -> Any:
    try:
        for key in path:
            given = given[key]
    except (KeyError, IndexError, TypeError) as error:
        raise StateError(f"{argument} holds nothing at {'.'.join(map(str, path))}.") from error
    return given


def _dtype(value: Any) -> str:
    name = str(value.data_type()).removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(name, name)


def _symbols(manifest: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Return the values of the open sizes, after checking every shape and what the graphs assume.

    Raises:
        StateError: The graphs were not made for these sizes.
    """
    symbols: dict[str, int] = {}
    for symbol in manifest["symbols"]:
        shape = shapes.get(symbol["input"], ())
        if symbol["dimension"] >= len(shape):
            raise StateError(f"{symbol['input']} has the shape {list(shape)}, too few dimensions.")
        symbols[symbol["name"]] = (shape[symbol["dimension"]] - symbol["offset"]) // symbol["factor"]
    for entry in manifest["inputs"]:
        expected = [arithmetic(size, symbols) for size in entry["shape"]]
        if list(shapes[entry["name"]]) != expected:
            shown = ", ".join(map(str, entry["shape"]))
            raise StateError(f"{entry['name']} has the shape {list(shapes[entry['name']])}, and the bundle takes [{shown}].")
    for condition in manifest["conditions"]:
        if not arithmetic(condition, symbols):
            raise StateError(f"the graphs hold where {condition}, and here {', '.join(f'{k} is {v}' for k, v in symbols.items())}.")
    return symbols


def bound(manifest: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Match a call's arguments to the graphs' inputs.

    Raises:
        StateError: An argument is missing, unknown, of another dtype, constant or shape than the bundle's.
    """
    names = manifest["arguments"]
    if len(args) > len(names):
        raise StateError(f"{len(args)} positional arguments, and the model takes {', '.join(names)}.")
    given = dict(zip(names, args, strict=False))
    twice = sorted(set(given) & set(kwargs))
    if twice:
        raise StateError(f"{', '.join(twice)} is given twice, by position and by name.")
    given |= kwargs
    expected = {entry["argument"] for entry in [*manifest["inputs"], *manifest["constants"]]}
    missing = sorted({entry["argument"] for entry in manifest["inputs"]} - set(given))
    if missing:
        raise StateError(f"{', '.join(missing)} is missing; the bundle takes {', '.join(sorted(expected))}.")
    for entry in manifest["constants"]:
        if entry["argument"] in given:
            found = _inside(given[entry["argument"]], entry["path"], entry["argument"])
            if type(found) is not type(entry["value"]) or found != entry["value"]:
                raise StateError(f"{entry['argument']} is {found!r}, and the bundle was made for {entry['value']!r}.")
    unknown = sorted(name for name in set(given) - expected if given[name] is not None)
    if unknown:
        raise StateError(f"{', '.join(unknown)} is not among what the bundle takes: {', '.join(sorted(expected))}.")
    found = {e["name"]: _inside(given[e["argument"]], e["path"], e["argument"]) for e in manifest["inputs"]}
    return flat_call(manifest, found)


def flat_call(manifest: dict[str, Any], given: dict[str, Any]) -> Call:
    """Check and convert inputs that go by the graphs' own names.

    Raises:
        StateError: An input is of another dtype or shape than the bundle's.
    """
    values, shapes = {}, {}
    for entry in manifest["inputs"]:
        name = entry["name"]
        value = _value(given[name], name, entry["dtype"])
        if _dtype(value) != entry["dtype"]:
            raise StateError(f"{name} is {_dtype(value)}, and the bundle takes {entry['dtype']}.")
        values[name], shapes[name] = value, tuple(value.shape())
    return Call(values, shapes, _symbols(manifest, shapes))
