"""Typed parts of a JSON document: read with every field checked against its annotation, and written without loss. Needs no torch."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, Union

from bwcache_compile.config import CacheConfig

E = TypeVar("E", bound="Entry")

_KINDS = {bool: "a flag", int: "an integer", float: "a number", str: "text", types.NoneType: "null"}
_NOT_FINITE = ("inf", "-inf", "nan")
"""What stands for numbers that JSON has not."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A table with known fields.

    A field whose default is None may be absent. A `float` may be written as an integer, or as text where it is not finite.

    Attributes:
        extra: What else the table holds: nothing reads it, and it is written back.
    """

    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_json(cls: type[E], value: Any, place: str) -> E:
        """Read what `to_json` wrote; `place` is where the value stands, for messages.

        Raises:
            ValueError: A field is missing, or something else than its annotation says.
        """
        table, known = _table(value, place), _fields(cls)
        missing = [name for name, (_, optional) in known.items() if name not in table and not optional]
        if missing:
            raise ValueError(f"{place}: {', '.join(missing)} is missing")
        found = {name: _read(kind, table[name], f"{place}.{name}") for name, (kind, _) in known.items() if name in table}
        return cls(**found, extra={name: item for name, item in table.items() if name not in known})

    def to_json(self) -> dict[str, Any]:
        """Return the table as JSON has it; a field that may be absent and is None is left out."""
        values = {name: (getattr(self, name), optional) for name, (_, optional) in _fields(type(self)).items()}
        known = {name: _written(value) for name, (value, optional) in values.items() if not (optional and value is None)}
        return {**known, **_written(self.extra)}


def _annotated(kind: type[Entry]) -> dict[str, tuple[Any, bool]]:
    """Return the annotation of each field, and whether it may be absent."""
    annotations = typing.get_type_hints(kind)
    return {field.name: (annotations[field.name], field.default is None) for field in dataclasses.fields(kind) if field.name != "extra"}


_fields = typing.cast(Callable[[type[Entry]], dict[str, tuple[Any, bool]]], functools.cache(_annotated))


def _table(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _unexpected("a table", value, place)
    return value


def _unexpected(expected: str, value: Any, place: str) -> ValueError:
    return ValueError(f"{place}: expected {expected}, got {repr(value)[:60]}")


def _read(kind: Any, value: Any, place: str) -> Any:
    """Return a value of an annotated kind: a plain one, an entry, settings, a list, a table, or one of several."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is tuple:
        if not isinstance(value, list) or (inside[-1] is not ... and len(value) != len(inside)):
            raise _unexpected("a list" if inside[-1] is ... else f"a list of {len(inside)}", value, place)
        return tuple(_read(inside[0] if inside[-1] is ... else inside[i], item, f"{place}[{i}]") for i, item in enumerate(value))
    if origin is Mapping:
        return {key: _read(inside[1], item, f"{place}.{key}") for key, item in _table(value, place).items()}
    if kind is CacheConfig:
        return _settings(_table(value, place))
    choices = inside if origin in (Union, types.UnionType) else (kind,)
    if type(value) in choices or (type(value) is int and float in choices):
        return value
    if float in choices and isinstance(value, str) and value in _NOT_FINITE:
        return float(value)
    others = [choice for choice in choices if choice not in _KINDS]
    if not others:
        raise _unexpected(" or ".join(_KINDS[choice] for choice in choices), value, place)
    if isinstance(others[0], type) and issubclass(others[0], Entry):
        return others[0].from_json(value, place)
    return _read(others[0], value, place)


def _settings(table: dict[str, Any]) -> CacheConfig:
    values: dict[str, Any] = {name: float(value) if value in _NOT_FINITE else value for name, value in table.items()}
    try:
        return CacheConfig(**values)
    except (TypeError, ValueError, OverflowError) as error:  # a ConfigError is a ValueError
        raise ValueError(f"config: not valid in this version: {str(error).rstrip('.')}") from error


def _written(value: Any) -> Any:
    if isinstance(value, Entry):
        return value.to_json()
    if isinstance(value, CacheConfig):
        return _written(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {name: _written(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_written(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
