"""Copies of a module tree in which some modules are others; everything else is shared with the original."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def with_modules(model: nn.Module, replaced: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return copies of the model and of the modules on the way to those that are replaced, by path; "" is the model's.

    Parameters, buffers, attributes and all other modules are the original's own.
    """
    copies = {"": _copy(model)}
    for path, module in replaced.items():
        *above, name = path.split(".")
        owner = copies[""]
        for depth in range(1, len(above) + 1):
            here = ".".join(above[:depth])
            if here not in copies:
                copies[here] = owner._modules[above[depth - 1]] = _copy(_child(owner, above[depth - 1]))
            owner = copies[here]
        owner._modules[name] = module
    return copies


def write_back(model: nn.Module, copies: Mapping[str, nn.Module]) -> None:
    """Give the originals the attributes that the copies were given by a forward."""
    for path, copy in copies.items():
        original = model.get_submodule(path)
        mine: dict[str, Any] = original.__dict__
        for name, value in copy.__dict__.items():
            if name != "_modules" and mine.get(name, copies) is not value:
                mine[name] = value


def _child(owner: nn.Module, name: str) -> nn.Module:
    module = owner._modules[name]
    assert module is not None
    return module


def _copy(module: nn.Module) -> nn.Module:
    copy = type(module).__new__(type(module))
    copy.__dict__.update(module.__dict__)
    copy.__dict__["_modules"] = dict(module._modules)
    return copy
