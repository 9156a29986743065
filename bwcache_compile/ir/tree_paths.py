"""Find the path of each leaf of a call or of an output, through lists, dictionaries and registered classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from bwcache_compile.ir.torch_compat import pytree

Path = tuple[int | str, ...]


def _places(tree: Any, path: Path = ()) -> Iterator[tuple[int, Path]]:
    """Yield the position and the path of every leaf of a tree whose leaves are their positions."""
    inside: Any
    if isinstance(tree, int):
        yield tree, path
    if tree is None or isinstance(tree, int):  # a field that a registered dataclass leaves out is None
        return
    if isinstance(tree, Mapping):
        inside = tree.items()
    elif isinstance(tree, (list, tuple)):
        inside = enumerate(tree)
    elif dataclasses.is_dataclass(tree):
        inside = [(field.name, getattr(tree, field.name)) for field in dataclasses.fields(tree)]
    else:
        inside = enumerate(pytree.tree_leaves(tree))
    for key, value in inside:
        yield from _places(value, (*path, key if isinstance(key, int) else str(key)))


def positions(spec: pytree.TreeSpec) -> Any:
    """Return a tree of this kind whose leaves are their positions."""
    return pytree.tree_unflatten(list(range(spec.num_leaves)), spec)


def leaf_paths(spec: pytree.TreeSpec) -> list[Path]:
    """Return the path of every leaf, in flat order."""
    found = dict(_places(positions(spec)))
    return [found[i] for i in range(spec.num_leaves)]


def output_name(path: Path) -> str:
    """Name an output by its path: `sample`, `output`, `output_0_mask`."""
    key = "_".join(map(str, path))
    return (f"output_{key}" if not key or key[0].isdigit() else key).rstrip("_")
