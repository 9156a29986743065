"""Noticing before every call, and cheaply, that a model is no longer the one that was captured."""

from __future__ import annotations

import math
import types
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from bwcache_compile.errors import ConfigError

_STANDARD = frozenset(vars(nn.Module())) - {"training"}
"""What every module has; the registries among it are looked into."""

_REGISTRIES = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
_CONSTANTS = (bool, int, float, complex, str, bytes, type(None))
_OPAQUE = (nn.Module, Tensor, type, types.ModuleType, types.FunctionType, types.MethodType, *_CONSTANTS)

_REGISTRY = "_diffusers_hook"
"""Where diffusers keeps a module's hooks; a pipeline leaves it behind after a run, with or without any."""

_version = attrgetter("_version")


def refuse_hooks(model: nn.Module) -> None:
    """Refuse a model whose weights come and go, or whose modules are wrapped by other libraries' hooks.

    Raises:
        ConfigError: A parameter has no data here, or accelerate or diffusers put a hook on a module.
    """
    kind = type(model).__name__
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ConfigError(
                f"the parameter {name} of {kind} has no data here (device meta): an offload hook moves it in and out, and a"
                " captured graph would hold on to copies. Place the whole model on one device first."
            )
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        registry = getattr(module, _REGISTRY, None)
        hooks = [hook, *(getattr(registry, "hooks", None) or {}).values()]
        kinds = [type(h).__name__ for h in hooks if h is not None]
        if kinds:
            raise ConfigError(
                f"{f'the module {name}' if name else 'the top module'} of {kind} has a hook around its forward ({', '.join(kinds)}):"
                " offloading, casting and other caches work by such hooks, and a captured graph would leave them out or hold on"
                " to copies of the weights. Remove the hook (for offloading: place the whole model on one device) first."
            )


def _same(old: Any, new: Any) -> bool:
    """Whether two values are one, or equal constants, or containers of such: exporting a model copies its containers."""
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


class ModelWatch:
    """Counts the changes of a model: to what it is made of, and to the values of its weights.

    A captured graph holds on to modules, parameters and everything that Python read while it was traced, so these are
    watched: the registries of every module, its own attributes, and what the dictionaries, lists and plain objects
    among those hold (attention processors, adapter scales). Weights are watched by their count of in-place writes and
    by address. An edit through `parameter.data` that keeps the address moves neither, and is not seen.

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
        self._accept()

    def _accept(self) -> None:
        """Take the model as it is for unchanged."""
        tables: list[tuple[str, Any]] = []
        places: list[tuple[str, dict[Any, Any], Any]] = []
        for name, module in self._model.named_modules():
            prefix, attributes = name and f"{name}.", vars(module)
            tables.append((name, attributes))
            for registry in _REGISTRIES:
                tables.append((name, attributes[registry]))
                places += ((f"{prefix}{key}", attributes[registry], key) for key in attributes[registry])
            library = type(module).__module__.startswith("torch.nn.modules.")
            for key in attributes.keys() - _STANDARD:
                if library and key != "training" and isinstance(attributes[key], _CONSTANTS):
                    continue  # sizes, which go with the parameters; they would be half of all there is to look at
                places.append((prefix + key, attributes, key))
                for held in _inside(key, attributes[key]):
                    tables.append((prefix + key, held))
                    if isinstance(held, dict):
                        places += ((f"{prefix}{key}.{inner}", held, inner) for inner in held)
        tables = [entry for entry in tables if entry[0] not in self._scratch]
        places = [entry for entry in places if entry[0] not in self._scratch]
        self._table_names, self._tables = [name for name, _ in tables], [table for _, table in tables]
        self._sizes = list(map(len, self._tables))
        self._entries = [frozenset(table) if isinstance(table, dict) else frozenset() for table in self._tables]
        self._names = [name for name, _, _ in places]
        self._dicts, self._keys = [table for _, table, _ in places], [key for _, _, key in places]
        self._held = list(map(dict.get, self._dicts, self._keys))  # held on to, so that no identity is used twice
        self._ids = list(map(id, self._held))
        self._parameters = list(self._model.parameters())
        self._counted = [p for p in self._parameters if not p.is_inference()]
        self._kinds, self._written = list(map(_kind, self._parameters)), self._writes()

    def _writes(self) -> tuple[list[int], list[int]]:
        return list(map(_version, self._counted)), list(map(_address, self._parameters))

    def look(self) -> None:
        """Count what changed since the last look. Takes about a microsecond per module.

        Raises:
            ConfigError: The change put a hook on a module, or took a parameter's data away.
        """
        if list(map(len, self._tables)) != self._sizes or list(map(id, map(dict.get, self._dicts, self._keys))) != self._ids:
            changed = self._differences()
            if changed:
                refuse_hooks(self._model)
                self.structure, self.changed = self.structure + 1, changed[0]
                self._accept()
                return
            kinds, writes = self._kinds, self._written
            self._accept()
            self._kinds, self._written = kinds, writes
        written = self._writes()
        if written != self._written:
            kinds = list(map(_kind, self._parameters))
            if kinds == self._kinds:
                self.weights += 1
            else:
                self.structure, self.changed = self.structure + 1, "the weights' dtype or device"
            self._kinds, self._written = kinds, written

    def absorb(self) -> None:
        """Take the model for unchanged after it was run: what its own forward changed is scratch, and not watched again."""
        self._scratch.update(name for name in self._differences() if name)
        self._accept()

    def _differences(self) -> list[str]:
        """Name the places that hold something else than they did; equal constants are no difference."""
        places = zip(self._names, self._dicts, self._keys, self._held, strict=True)
        other = [name for name, table, key, held in places if not _same(held, table.get(key))]
        tables = zip(self._table_names, self._tables, self._sizes, self._entries, strict=True)
        resized = (name for name, table, size, entries in tables if len(table) != size and not _only_empty_registry(table, entries))
        return other + [name or type(self._model).__name__ for name in resized]


def _only_empty_registry(table: Any, entries: frozenset[Any]) -> bool:
    """Whether all that is new is diffusers' registry of hooks without a hook, which a pipeline leaves behind after a run."""
    if not isinstance(table, dict) or table.keys() - entries != {_REGISTRY} or entries - table.keys():
        return False
    return not getattr(table[_REGISTRY], "hooks", None)


def _address(parameter: Tensor) -> int:
    try:
        return parameter.data_ptr()
    except RuntimeError:  # a tensor subclass without storage of its own
        return 0


def _kind(parameter: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return parameter.shape, parameter.dtype, parameter.device


def _inside(name: str, value: Any) -> Iterator[Any]:
    """Yield what a module's attribute holds other things in: itself, or the attributes of a plain object."""
    if name == _REGISTRY:
        yield getattr(value, "hooks", {})  # the rest is filled in as pipelines run
    elif isinstance(value, (dict, list)):
        yield value
    elif not isinstance(value, _OPAQUE) and isinstance(getattr(value, "__dict__", None), dict):
        yield vars(value)
