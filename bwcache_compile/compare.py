"""Whether a graph returned what the model returns, bit for bit."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bwcache_compile.errors import CacheWarning


def flat_outputs(outputs: Any) -> list[Any]:
    """Return the leaves of a model's output, in the order in which the graph returns them."""
    return pytree.tree_leaves(outputs)


def clone_tensors(tree: Any) -> Any:
    """Copy every tensor of a call, so that running the model twice on it cannot differ through in-place edits."""
    return pytree.tree_map_only(Tensor, torch.clone, tree)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one dtype hold the same values; NaN equals NaN."""
    if one.shape != other.shape:
        return False
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def difference(expected: list[Any], actual: list[Any]) -> str | None:
    """Say how two flat outputs differ, bit for bit; NaN equals NaN."""
    if len(expected) != len(actual):
        return f"{len(actual)} outputs instead of {len(expected)}"
    for i, (want, got) in enumerate(zip(expected, actual, strict=True)):
        if not isinstance(want, Tensor):
            if want != got:
                return f"output {i} is {got!r} instead of {want!r}"
            continue
        if not isinstance(got, Tensor) or (want.shape, want.dtype) != (got.shape, got.dtype):
            return f"output {i} is {type(got).__name__} of another shape or dtype"
        if not same(want, got):
            wide = torch.complex128 if want.is_complex() else torch.float64
            worst = (want.to(wide) - got.to(wide)).abs().max().item()
            return f"output {i} differs by up to {worst:.3g}"
    return None


def difference_from(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], expected: list[Any], actual: list[Any]) -> str | None:
    """Say how a graph's outputs differ from a model's, or from those of the model with the functions that it compiles uncompiled."""
    wrong = difference(expected, actual)
    if wrong is not None:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            plain = flat_outputs(model(*clone_tensors(args), **clone_tensors(kwargs)))
        if difference(plain, actual) is not None:
            return wrong
        with torch.no_grad():  # a model that counts its calls returns something else each time, compiled functions or none
            again = flat_outputs(model(*clone_tensors(args), **clone_tensors(kwargs)))
        if difference(expected, again) is None:
            warnings.warn(
                f"{type(model).__name__} compiles functions of its own, whose kernels round differently: the captured graph is the model"
                " with these uncompiled, bit for bit. torch.compile the cached model to have all of it compiled.",
                CacheWarning,
                stacklevel=2,
            )
            return None
    return wrong
