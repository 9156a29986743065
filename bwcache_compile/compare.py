"""Whether a graph returned what the model returns, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def flat_outputs(outputs: Any) -> list[Any]:
    """Return the leaves of a model's output, in the order in which the graph returns them."""
    return pytree.tree_leaves(outputs)


def clone_tensors(tree: Any) -> Any:
    """Copy every tensor of a call, so that running the model twice on it cannot differ through in-place edits."""
    return pytree.tree_map_only(Tensor, torch.clone, tree)


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
        if not torch.equal(torch.nan_to_num(want), torch.nan_to_num(got)):
            worst = (want.double() - got.double()).abs().max().item()
            return f"output {i} differs by up to {worst:.3g}"
    return None
