"""Detect before every call, at low cost, that a model is no longer the one that was captured."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from bwcache_compile.runtime.hooks import HOOK_REGISTRY, is_only_empty_registry, refuse_hooks

_STANDARD = frozenset(vars(nn.Module())) - {"training"}
"""Attributes that every module has; the entries of `_REGISTRIES` are watched, and no other of these."""

_REGISTRIES = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
_CONSTANTS = (bool, int, float, complex, str, bytes, type(None))
_OPAQUE = (nn.Module, Tensor, type, types.ModuleType, types.FunctionType, types.MethodType, *_CONSTANTS)

_GLANCE = 1000
"""Most that one glance compares, in units of about 20 ns."""

_version = attrgetter("_version")
_data_ptr = Tensor.data_ptr


def _same(old: Any, new: Any) -> bool:
    """Whether two values are the same object, equal constants, or containers of these: exporting a model copies its containers."""
    if new is old:
        return True
    if type(new) is not type(old):
        return False
    if isinstance(old, (list, tuple)):
        return len(old) == len(new) and all(map(_same, old, new))
    if isinstance(old, dict):
        return old.keys() == new.keys() and all(_same(old[key], new[key]) for key in old)
    if isinstance(old, float):
        return math.isclose(old, new)  # a forward that scales an adapter and scales it back leaves a rounding error behind
    return isinstance(old, _CONSTANTS) and bool(new == old)


class _Part:
    """Watches some modules of a model: dictionaries and lists by length, their entries by identity, tensors by writes and address."""

    def __init__(self) -> None:
        self.table_names: list[str] = []
        self.tables: list[Any] = []
        self.places: list[tuple[str, dict[Any, Any], Any]] = []
        self.tensors: list[tuple[str, Tensor]] = []

    def accept(self) -> None:
        """Accept the present state as unchanged."""
        self._empty = [table for table in self.tables if not table]
        self._filled = [table for table in self.tables if table]
        self._sizes = list(map(len, self._filled))
        self.was = [(len(table), frozenset(table) if isinstance(table, dict) else frozenset()) for table in self.tables]
        self._dicts, self._keys = [table for _, table, _ in self.places], [key for _, _, key in self.places]
        self.held = list(map(dict.get, self._dicts, self._keys))  # held on to, so that no identity is used twice
        self._ids = list(map(id, self.held))
        self._counted = [tensor for _, tensor in self.tensors if not tensor.is_inference()]
        self._placed = [tensor for _, tensor in self.tensors if address_of(tensor)]
        self.kinds, self._written = [_kind(tensor) for _, tensor in self.tensors], self._writes()
        self._each = [self._write(tensor) for _, tensor in self.tensors]

    @staticmethod
    def _write(tensor: Tensor) -> tuple[int, int]:
        return (0 if tensor.is_inference() else tensor._version), address_of(tensor)

    def _writes(self) -> tuple[list[int], list[int]]:
        return list(map(_version, self._counted)), list(map(_data_ptr, self._placed))

    def moved(self) -> bool:
        """Whether an entry may be another object, or there are more or fewer entries."""
        return (
            any(self._empty)
            or list(map(len, self._filled)) != self._sizes
            or list(map(id, map(dict.get, self._dicts, self._keys))) != self._ids
        )

    def written(self) -> bool:
        """Whether a tensor was written to, or has other memory."""
        return self._writes() != self._written

    def writes(self) -> list[tuple[str, Tensor, bool]]:
        """Return the tensors that were written to, each with its name and whether it has another shape, dtype or device."""
        rows = zip(self.tensors, self._each, self.kinds, strict=True)
        return [(name, tensor, _kind(tensor) != kind) for (name, tensor), each, kind in rows if self._write(tensor) != each]


class ModelWatch:
    """Counts the changes of a model: to what it is made of, and to the values of its weights.

    A captured graph holds on to modules, tensors and everything that Python read while it was traced, so these are
    watched: the registries of every module, its own attributes, and what the dictionaries, lists and plain objects
    among those hold (attention processors, adapter scales). Tensors are watched by their count of in-place writes and
    by address. An edit through `parameter.data` that keeps the address moves neither, and is not seen.

    `poll` compares everything and `glance` one part of the modules, each in its turn, where time counts. A part has as many
    modules as are compared in about 20 us; a model of up to some 50 modules is one part.

    Attributes:
        structure: Moves on when a graph captured before has become wrong.
        weights: Moves on when the weights hold other values.
        changed: What moved `structure` last, for messages.
    """

    def __init__(self, model: nn.Module) -> None:
        """Take the model as it is for unchanged."""
        self._model = model
        self.structure, self.weights, self.changed = 0, 0, ""
        self._scratch: set[str] = set()
        self._constants: set[str] = set()
        self._live: frozenset[int] = frozenset()
        self._turn, self._suspect = 0, False
        self._accept()

    def _accept(self) -> None:
        """Take the model as it is for unchanged."""
        single = [_Part()]
        cost = sum(self._fill(single[0], name, module) for name, module in self._model.named_modules())
        count = 1 + cost // _GLANCE
        if count > 1:
            single = [_Part() for _ in range(count)]
            for i, (name, module) in enumerate(self._model.named_modules()):
                self._fill(single[i % count], name, module)
        for part in single:
            part.accept()
        self._parts, self._suspect = single, False

    def _fill(self, part: _Part, name: str, module: nn.Module) -> int:
        """Watch a module as part of others; return about how long it takes to compare, in units of 20 ns."""
        before = len(part.places), len(part.tensors), len(part.tables)
        prefix, attributes = name and f"{name}.", vars(module)
        tables: list[tuple[str, Any]] = [(name, attributes)]
        places: list[tuple[str, dict[Any, Any], Any]] = []
        for registry in _REGISTRIES:
            tables.append((name, attributes[registry]))
            places += ((f"{prefix}{key}", attributes[registry], key) for key in attributes[registry])
        library = type(module).__module__.startswith("torch.nn.modules.")
        for key in attributes.keys() - _STANDARD:
            if library and key != "training" and isinstance(attributes[key], _CONSTANTS):
                continue  # sizes, which go with the parameters; they would be half of all there is to look at
            path = prefix + key
            self._constants.update(path for _ in filter(self._is_live, _tensors_in(attributes[key])))
            places.append((path, attributes, key))
            for held in _inside(key, attributes[key]):
                tables.append((path, held))
                if isinstance(held, dict):
                    for inner, value in held.items():
                        self._constants.update(f"{path}.{inner}" for _ in filter(self._is_live, _tensors_in(value)))
                        places.append((f"{path}.{inner}", held, inner))
        ignored = self._scratch - self._constants
        for path, table in tables:
            if path not in ignored:
                part.tables.append(table)
                part.table_names.append(path)
        for path, table, key in places:
            if path not in ignored:
                part.places.append((path, table, key))
                if not isinstance(table[key], nn.Module):
                    part.tensors += ((path, tensor) for tensor in _tensors_in(table[key]))
        after = len(part.places), len(part.tensors), len(part.tables)
        return sum(weight * (b - a) for weight, a, b in zip((4, 4, 1), before, after, strict=True))

    def _is_live(self, tensor: Tensor) -> bool:
        return address_of(tensor) in self._live

    def suspect(self) -> None:
        """Have the next glance look at everything: something was called that may change the model."""
        self._suspect = True

    def glance(self) -> None:
        """Look at one part of the modules, and at everything if it changed.

        Raises:
            ConfigError: See `poll`.
        """
        part = self._parts[self._turn % len(self._parts)]
        self._turn += 1
        if self._suspect or part.moved() or part.written():
            self.poll()

    def poll(self) -> None:
        """Count what changed since the last look. Takes about a microsecond per module.

        Raises:
            ConfigError: The change put a hook on a module, or took a parameter's data away.
        """
        self._suspect = False
        moved = any(part.moved() for part in self._parts)
        if moved:
            changed = list(self._differences())
            if changed:
                refuse_hooks(self._model)
                self.structure, self.changed = self.structure + 1, changed[0] or type(self._model).__name__
                self._accept()
                return
        written = [row for part in self._parts if part.written() for row in part.writes()]
        if written:
            self._count(written)
        if moved or written:
            self._accept()

    def _count(self, written: list[tuple[str, Tensor, bool]]) -> None:
        """Count writes. A graph reads parameters where they are, and of other tensors it may hold copies or what Python read."""
        parameters = [kind for _, tensor, kind in written if isinstance(tensor, nn.Parameter)]
        others = [name for name, tensor, kind in written if not isinstance(tensor, nn.Parameter) and (kind or not self._is_live(tensor))]
        if any(parameters):
            self.structure, self.changed = self.structure + 1, "the weights' dtype or device"
        elif others:
            self.structure, self.changed = self.structure + 1, others[0]
        else:
            self.weights += 1

    def accept_changes(self, live: frozenset[int] = frozenset()) -> Forward:
        """Accept what the model's own forward changed, and stop tracking tensors that it keeps, unless a graph holds them.

        Args:
            live: Addresses of the tensors that graphs hold.

        Returns:
            What the forward changed.
        """
        self._live = live
        kept, counted = [], []
        for name, value in self._differences().items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                counted.append(name)
            elif not isinstance(value, _CONSTANTS):
                kept.append(name)
        self._scratch.update(set(kept) - {name for name, _ in self._model.named_modules()})
        self._accept()
        return Forward(tuple(kept), tuple(counted))

    def _differences(self) -> dict[str, Any]:
        """Return what the places that changed hold now, by name; equal constants are no difference."""
        other: dict[str, Any] = {}
        for part in self._parts:
            for (name, table, key), held in zip(part.places, part.held, strict=True):
                if not _same(held, table.get(key)):
                    other.setdefault(name, table.get(key))
        for part in self._parts:
            for name, table, (size, entries) in zip(part.table_names, part.tables, part.was, strict=True):
                if len(table) != size and not is_only_empty_registry(table, entries):
                    other.setdefault(name, table)
        return other


@dataclasses.dataclass(frozen=True)
class Forward:
    """What a model's own forward changed of the model: names of what it keeps, and of the numbers that it counts."""

    kept: tuple[str, ...]
    counted: tuple[str, ...]


def _tensors_in(value: Any) -> list[Tensor]:
    """Return a tensor, or those among the entries of a list or dictionary."""
    if isinstance(value, Tensor):
        return [value]
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [entry for entry in entries if isinstance(entry, Tensor)]


def address_of(parameter: Tensor) -> int:
    """Return where a tensor lies in memory; 0 for one without memory of its own."""
    try:
        return parameter.data_ptr()
    except RuntimeError:  # a tensor subclass without storage of its own
        return 0


def _kind(parameter: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return parameter.shape, parameter.dtype, parameter.device


def _inside(name: str, value: Any) -> Iterator[Any]:
    """Yield the containers of a module's attribute: the attribute itself, or the dictionary of a plain object."""
    if name == HOOK_REGISTRY:
        yield getattr(value, "hooks", {})  # the rest is filled in as pipelines run
    elif isinstance(value, (dict, list)):
        yield value
    elif not isinstance(value, _OPAQUE) and isinstance(getattr(value, "__dict__", None), dict):
        yield vars(value)
