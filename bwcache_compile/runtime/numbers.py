"""Pass Python numbers that change at every call, such as a timestep, to the graphs as tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from bwcache_compile.errors import CaptureError, StateError, first_line
from bwcache_compile.ir.compare import clone_tensors, difference, flat_outputs
from bwcache_compile.ir.torch_compat import pytree
from bwcache_compile.runtime.signature import Call


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, (int, float)) and not isinstance(leaf, bool)


class NumberInputs:
    """Remembers which Python numbers of a model's calls are passed as tensors. All others are constants of the graph."""

    def __init__(self) -> None:
        """Start with none."""
        self._places: set[tuple[str, int]] = set()

    def as_tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Return a call with these numbers as tensors of rank 0: float64 or int64, which hold what Python holds."""
        if not self._places:
            return args, kwargs
        leaves, spec = pytree.tree_flatten((args, kwargs))
        structure = str(spec)
        for i, leaf in enumerate(leaves):
            if (structure, i) in self._places and _is_number(leaf):
                leaves[i] = torch.tensor(leaf, dtype=torch.float64 if isinstance(leaf, float) else torch.int64)
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return args, kwargs

    @contextlib.contextmanager
    def trying(self, model: nn.Module, call: Call, at: int, name: str, before: Any) -> Iterator[None]:
        """Pass the number at a position of such calls as a tensor, if the model can be run and captured with one.

        Raises:
            StateError: The model returns something else for the tensor, or what is done inside cannot capture it.
        """
        leaves, spec = pytree.tree_flatten(call)
        place, now = (str(spec), at), leaves[at]
        self._places.add(place)
        try:
            wrong = self._difference(model, call)
            if wrong is None:
                yield
        except CaptureError as error:
            wrong = first_line(error)
        if wrong is not None:
            self._places.discard(place)
            raise StateError(
                f"`{name}` is a Python number that changes between calls ({before}, then {now}). Python numbers are constants of a captured"
                f" graph, so nothing can be reused. Change the model so that it accepts a tensor, such as torch.tensor({now}); capturing"
                f" it with one failed: {wrong}\n  If each call belongs to a different run, call"
                " cached.reset() between them."
            )

    def _difference(self, model: nn.Module, call: Call) -> str | None:
        """Say how the model's output for the tensor differs from that for the number."""
        args, kwargs = self.as_tensors(*call)
        try:
            with torch.no_grad():
                expected = flat_outputs(model(*clone_tensors(call[0]), **clone_tensors(call[1])))
                return difference(expected, flat_outputs(model(*clone_tensors(args), **clone_tensors(kwargs))))
        except Exception as error:  # whatever the model raises
            return f"{type(error).__name__}: {first_line(error)}"
