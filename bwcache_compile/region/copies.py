"""Copies of a module tree in which some modules are others; everything else is shared with the original."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from bwcache_compile.errors import ConfigError
from bwcache_compile.runtime.hooks import HOOK_REGISTRY, hook_kinds


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
            if name != "_modules" and mine.get(name, copies) is not value and not _is_bound(value, copy):
                mine[name] = value


def _child(owner: nn.Module, name: str) -> nn.Module:
    module = owner._modules[name]
    assert module is not None
    return module


def _copy(module: nn.Module) -> nn.Module:
    copy = type(module).__new__(type(module))
    copy.__dict__.update({name: _rebound(value, module, copy) for name, value in module.__dict__.items()})
    copy.__dict__["_modules"] = dict(module._modules)
    refs = getattr(getattr(module, HOOK_REGISTRY, None), "_fn_refs", ())
    if refs:
        _check_refs(module, refs)
        copy.__dict__["forward"] = functools.partial(_forward_with_hooks, copy, module, refs)
    return copy


def _check_refs(module: nn.Module, refs: Sequence[Any]) -> None:
    """Refuse hooks of diffusers that run something else than the module's forward.

    Raises:
        ConfigError: There is one.
    """
    if any(ref.original_forward is not None for ref in refs):
        raise ConfigError(
            f"{type(module).__name__} has a hook of diffusers that replaces its forward ({', '.join(hook_kinds(module))}), such as another"
            " cache. Remove it first."
        )


def _forward_with_hooks(copy: nn.Module, module: nn.Module, refs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
    """Run a copy between the hooks of diffusers that its original has: they hold on to the original, so they are given that."""
    for ref in reversed(refs):
        args, kwargs = ref.pre_forward(module, *args, **kwargs)
    returned = type(module).forward(copy, *args, **kwargs)
    for ref in refs:
        returned = ref.post_forward(module, returned)
    return returned


def _is_bound(value: Any, module: nn.Module) -> bool:
    """Whether an attribute is a method of a module, or a function that is given the module first, as accelerate's hooks are."""
    if isinstance(value, functools.partial):
        return bool(value.args) and value.args[0] is module
    return isinstance(value, types.MethodType) and value.__self__ is module


def _rebound(value: Any, module: nn.Module, copy: nn.Module) -> Any:
    """Return an attribute of a module for its copy: what is bound to the module is bound to the copy."""
    if not _is_bound(value, module):
        return value
    if isinstance(value, types.MethodType):
        return types.MethodType(value.__func__, copy)
    return functools.update_wrapper(functools.partial(value.func, copy, *value.args[1:], **value.keywords), value)
