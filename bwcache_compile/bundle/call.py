"""A call of a session: which input each argument is, which sizes it has, and how the outputs are put together. Needs no torch."""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from bwcache_compile.bundle.arithmetic import arithmetic
from bwcache_compile.bundle.manifest import InputEntry, Manifest, Size, TensorEntry
from bwcache_compile.errors import StateError
from bwcache_compile.size_expressions import names_in


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


def put_together(form: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    """Return outputs as the model returned them: `form` has one entry, what it is and what is in it."""
    ((kind, inside),) = form.items()
    if kind == "tensor":
        return values[inside]
    if kind == "value":
        return inside
    if kind == "mapping":
        return Output({key: put_together(part, values) for key, part in inside.items()})
    parts = [put_together(part, values) for part in inside]
    return tuple(parts) if kind == "tuple" else parts


@dataclasses.dataclass(frozen=True)
class Call:
    """One call's tensors by input name, their shapes, and the values of the dynamic sizes."""

    values: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    symbols: dict[str, int]

    def sizes_of(self, shape: Sequence[Size]) -> tuple[int, ...]:
        """Return a shape at this call's sizes."""
        return tuple(arithmetic(size, self.symbols) for size in shape)


PAIRS = {"complex64": "float32"}
"""Of each complex dtype, the one of the pairs that an ONNX graph takes in its place, in one more dimension."""


def graph_shape(entry: TensorEntry) -> list[Size]:
    """Return the shape in which an ONNX graph takes an input of a manifest."""
    return [*entry.shape, 2] if entry.dtype in PAIRS else list(entry.shape)


class Runner(Protocol):
    """A runtime that holds a bundle's graphs. Values are tensors of its own kind, on its own device."""

    takes_buffers: bool
    """Whether a run can write into tensors that the session hands it."""

    @property
    def device(self) -> str:
        """Where values lie: `cpu`, `cuda:0`."""

    def value(self, given: Any, name: str, dtype: str) -> Any:
        """Return an input as a value; what lies on the device is not copied. Raises StateError for what is no tensor."""

    def kind(self, value: Any) -> tuple[str, tuple[int, ...]]:
        """Return a value's dtype, as the manifest names it, and its shape."""

    def full(self, slot: str, shape: tuple[int, ...], dtype: str, fill: float) -> Any:
        """Return a new value for a slot that holds one number everywhere."""

    def vector(self, numbers: Sequence[Any], dtype: str) -> Any:
        """Return a new value that holds these numbers, or rows of numbers."""

    def bytes(self, value: Any) -> int:
        """Return the size of a value."""

    def host(self, value: Any) -> Any:
        """Copy a value to the host."""

    def numbers(self, value: Any) -> Sequence[float]:
        """Copy a short real value of any dtype to the host, row by row."""

    def to_output(self, value: Any) -> Any:
        """Return an output in the form that the caller gets it."""

    def run(self, graph: str, inputs: Mapping[str, Any], buffers: Mapping[str, Any]) -> dict[str, Any]:
        """Run a graph; inputs and outputs go by its names. What `buffers` has is written there, if the runtime takes buffers.

        Raises:
            BundleError: The runtime failed.
        """


def _holds_nothing(given: Any) -> bool:
    return given is None or (isinstance(given, (dict, list, tuple)) and not given)


def _inside(given: Any, path: Sequence[int | str], argument: str) -> Any:
    try:
        for key in path:
            given = given[key]
    except (KeyError, IndexError, TypeError) as error:
        raise StateError(f"{argument} has no value at {'.'.join(map(str, path))}.") from error
    return given


def constraint_violated(manifest: Manifest, condition: str, sizes: Mapping[str, int]) -> str:
    """Say which condition on the sizes is violated, with sizes as inputs' dimensions where they are (`x.shape[1] >= 2`)."""
    got = ", ".join(f"{_named(manifest, name)} = {sizes[name]}" for name in sorted(names_in(condition) & sizes.keys()))
    return f"shape constraint violated: the graphs require {_named(manifest, condition)}, got {got}."


def _named(manifest: Manifest, text: str) -> str:
    """Write the symbols of an expression as the dimensions that they are read from, where they are these sizes as they are."""
    plain = [symbol for symbol in manifest.symbols if (symbol.offset, symbol.factor) == (0, 1)]
    places = {symbol.name: f"{symbol.input}.shape[{symbol.dimension}]" for symbol in plain}
    return re.sub(r"[A-Za-z_]\w*", lambda match: places.get(match.group(), match.group()), text)


def _wrong_shape(manifest: Manifest, entry: InputEntry, expected: Sequence[int], shape: Sequence[int]) -> str:
    """Say which shape an input must have: sizes that it decides itself are `any`, and those of another input name that one."""
    own = {(symbol.dimension, symbol.name) for symbol in manifest.symbols if symbol.input == entry.name}
    shown = ["any" if (place, size) in own else _named(manifest, str(size)) for place, size in enumerate(entry.shape)]
    follows = any(isinstance(size, str) and word != "any" for size, word in zip(entry.shape, shown, strict=True))
    text = f"{entry.name} must have shape [{', '.join(shown)}]{f', here {list(expected)}' * follows}, got {list(shape)}."
    fixed = len(shape) == len(expected) and any(isinstance(size, int) and size != got for size, got in zip(entry.shape, shape, strict=True))
    if fixed and not manifest.symbols:
        text += ' Every size is fixed in this bundle: transform with dynamic_shapes="auto" and export again to vary them.'
    return text


def _symbols(manifest: Manifest, shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Return the values of the dynamic sizes, after checking every shape and what the graphs assume.

    Raises:
        StateError: The graphs were not made for these sizes.
    """
    symbols: dict[str, int] = {}
    for symbol in manifest.symbols:
        shape = shapes.get(symbol.input, ())
        if symbol.dimension >= len(shape):
            raise StateError(f"{symbol.input} must have at least {symbol.dimension + 1} dimensions, got shape {list(shape)}.")
        symbols[symbol.name] = (shape[symbol.dimension] - symbol.offset) // symbol.factor
    for entry in manifest.inputs:
        expected = [arithmetic(size, symbols) for size in entry.shape]
        if list(shapes[entry.name]) != expected:
            raise StateError(_wrong_shape(manifest, entry, expected, shapes[entry.name]))
    for condition in manifest.conditions:
        if not arithmetic(condition, symbols):
            raise StateError(constraint_violated(manifest, condition, symbols))
    return symbols


def _same_constant(found: Any, value: Any) -> bool:
    """Whether an argument is what was built in: of its type, or a member of an enum with this value or name; True is not 1."""
    if isinstance(found, enum.Enum) and not isinstance(found, type(value)):
        return _same_constant(found.value, value) or found.name == value
    return isinstance(found, type(value)) and isinstance(found, bool) == isinstance(value, bool) and bool(found == value)


def bound(manifest: Manifest, runner: Runner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Match a call's arguments to the graphs' inputs.

    Raises:
        StateError: An argument is missing, unknown, of another dtype, constant or shape than the bundle's.
    """
    names = manifest.arguments
    if len(args) > len(names):
        raise StateError(f"got {len(args)} positional arguments, but the model takes {len(names)}: {', '.join(names)}.")
    given = dict(zip(names, args, strict=False))
    twice = sorted(set(given) & set(kwargs))
    if twice:
        raise StateError(f"got {', '.join(twice)} twice, by position and by name.")
    given |= kwargs
    tensors = {entry.argument for entry in manifest.inputs}
    expected = tensors | {constant.argument for constant in manifest.constants}
    takes = ", ".join([*(name for name in names if name in expected), *sorted(expected.difference(names))])
    missing = sorted(tensors - set(given))
    if missing:
        raise StateError(f"missing inputs: {', '.join(missing)}. The bundle takes {takes}.")
    for constant in manifest.constants:
        if constant.argument in given:
            found = _inside(given[constant.argument], constant.path, constant.argument)
            if not _same_constant(found, constant.value):
                raise StateError(f"{constant.argument} is {found!r}, but the bundle was exported for {constant.value!r}.")
    unknown = sorted(name for name in set(given) - expected if not _holds_nothing(given[name]))
    if unknown:
        raise StateError(
            f"unexpected inputs: {', '.join(unknown)}. The bundle takes {takes}: the arguments of the call that it was exported for."
        )
    found = {e.name: _inside(given[e.argument], e.path, e.argument) for e in manifest.inputs}
    return flat_call(manifest, runner, found)


def flat_call(manifest: Manifest, runner: Runner, given: Mapping[str, Any]) -> Call:
    """Check and convert inputs that go by the graphs' own names.

    Raises:
        StateError: An input is missing, of another dtype or shape than the bundle's, or holds other values than those built in.
    """
    values, shapes = {}, {}
    for entry in manifest.inputs:
        name = entry.name
        if name not in given:
            raise StateError(f"missing inputs: {name}. The bundle takes {', '.join(e.name for e in manifest.inputs)}.")
        value = runner.value(given[name], name, entry.dtype)
        dtype, shape = runner.kind(value)
        if dtype == PAIRS.get(entry.dtype) and shape[-1:] == (2,):
            dtype, shape = entry.dtype, shape[:-1]
        if dtype != entry.dtype:
            raise StateError(f"{name} must have dtype {entry.dtype}, got {dtype}.")
        values[name], shapes[name] = value, shape
    symbols = _symbols(manifest, shapes)
    for built in manifest.values:  # waits for the device
        if runner.host(values[built.input]).reshape(-1).tolist() != list(built.value):
            raise StateError(
                f"the values of {built.input} differ from those at export. The model reads them in Python, so they are constants of the"
                " graphs. Export a bundle for each set of values."
            )
    return Call(values, shapes, symbols)
