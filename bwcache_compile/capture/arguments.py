"""The arguments of a model's forward: their names, and which of their sizes an export leaves open."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.export import Dim

from bwcache_compile.errors import ConfigError
from bwcache_compile.ir.torch_compat import pytree


def leaf_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Name each leaf of a call after the argument that it belongs to."""
    by_position = [name for name, p in inspect.signature(model.forward).parameters.items() if p.kind != inspect.Parameter.VAR_KEYWORD]
    found = []
    for path, _ in pytree.tree_leaves_with_path((args, kwargs)):
        key = path[1]
        name = getattr(key, "key", None) or (by_position[key.idx] if key.idx < len(by_position) else f"argument {key.idx}")  # type: ignore[attr-defined]
        found.append(f"{name}{pytree.keystr(path[2:])}")
    return found


def signature_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.Signature:
    """Return the signature of a model's forward with a parameter for each keyword that it takes by `**kwargs` in this call."""
    signature = inspect.signature(model.forward)
    own = [p for name, p in signature.parameters.items() if p.kind != inspect.Parameter.VAR_KEYWORD]
    if len(own) == len(signature.parameters):
        return signature
    names = [name for name in kwargs if name not in {p.name for p in own}]
    return signature.replace(parameters=[*own, *(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names)])


def _arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return signature_of(model, args, kwargs).bind(*args, **kwargs).arguments


@contextlib.contextmanager
def with_signature(model: nn.Module, signature: inspect.Signature) -> Iterator[None]:
    """Give a model's forward this signature while active: torch.export makes no size of an argument in `**kwargs` dynamic."""
    if signature == inspect.signature(model.forward):
        yield
        return
    forward, own = model.forward, vars(model).get("forward")

    def explicit(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    vars(explicit)["__signature__"] = signature
    vars(model)["forward"] = explicit
    try:
        yield
    finally:
        del vars(model)["forward"]
        if own is not None:
            vars(model)["forward"] = own


def all_open(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], fixed: Iterable[Tensor]) -> dict[str, Any]:
    """Ask the exporter to make every dimension and Python int dynamic, except 0 and 1, which it always fixes.

    The sizes of the tensors in `fixed` stay fixed.
    """
    kept = set(map(id, fixed))

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and id(leaf) not in kept:
            return {i: Dim.AUTO for i, size in enumerate(leaf.shape) if size > 1}
        return Dim.AUTO if type(leaf) is int and leaf > 1 else None

    return pytree.tree_map(of_leaf, _arguments(model, args, kwargs))


def completed(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> Any:
    """Return `dynamic_shapes` with None, which fixes all sizes, for each argument that a specification by name leaves out."""
    if not isinstance(shapes, dict):
        return shapes
    names = _arguments(model, args, kwargs)
    if set(shapes) - set(names):
        raise ConfigError(
            f"dynamic_shapes names {', '.join(map(repr, sorted(set(shapes) - set(names))))}, but this call of {type(model).__name__}"
            f" passes only {', '.join(map(repr, names))}."
        )
    return {name: shapes.get(name) for name in names}
