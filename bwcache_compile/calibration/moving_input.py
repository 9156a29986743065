"""Find the input that moves from step to step and has the output's shape: the latents, in what layout a model takes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bwcache_compile.ir.torch_compat import pytree
from bwcache_compile.ir.tree_paths import Path, leaf_paths

MAX_ELEMENTS = 2**18
"""Elements recorded of an input or an output; larger ones are sampled. A fit of a few coefficients needs no more."""
_MOST_PIECES = 4


def _paths(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[Path, Any], pytree.TreeSpec]:
    """Return the leaves of a call by their path in `(args, kwargs)`, in order, and its structure."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    return dict(zip(leaf_paths(spec), leaves, strict=True)), spec


def float_leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Path, Tensor]:
    """Return the floating-point tensors of a call by their path, in order."""
    leaves, _ = _paths(args, kwargs)
    return {path: leaf for path, leaf in leaves.items() if isinstance(leaf, Tensor) and leaf.is_floating_point()}


def first_output(output: Any) -> Tensor:
    """Return the first floating-point tensor of an output."""
    return next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())


def time_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Path, tuple[float, ...]]:
    """Return the values of the inputs that may be the time: numbers, and tensors of at most one dimension."""
    leaves, _ = _paths(args, kwargs)
    times: dict[Path, tuple[float, ...]] = {}
    for path, leaf in leaves.items():
        if isinstance(leaf, Tensor):
            if leaf.dim() <= 1 and 0 < leaf.numel() <= 64 and not leaf.is_complex() and leaf.dtype is not torch.bool:
                times[path] = tuple(leaf.detach().double().reshape(-1).tolist())
        elif isinstance(leaf, (int, float)) and not isinstance(leaf, bool):
            times[path] = (float(leaf),)
    return times


def candidates(args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> dict[Path, Tensor]:
    """Return the inputs that may be the latents: those of the output's shape first, then those that differ in one dimension.

    The dimension that differs holds channels: inputs carry more where a condition is appended, outputs where a variance is learned.
    """
    leaves = float_leaves(args, kwargs)
    exact = {path: leaf for path, leaf in leaves.items() if leaf.shape == output.shape}
    close = {path: leaf for path, leaf in leaves.items() if leaf.dim() > 1 and _channel_dim(leaf.shape, output.shape) is not None}
    return exact | {path: leaf for path, leaf in close.items() if path not in exact}


def _channel_dim(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Return the only dimension but the first in which two shapes differ; None where there is not exactly one."""
    if len(one) != len(other):
        return None
    differ = [dim for dim, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
    return differ[0] if len(differ) == 1 and differ[0] > 0 else None


@dataclasses.dataclass(frozen=True)
class MovingInput:
    """Where the latents are in a call, and which elements of them and of the outputs are recorded.

    Attributes:
        path: Of the input in `(args, kwargs)`.
        channel_dim: Dimension in which input and output differ; None if they have one shape.
        channels: Leading channels that both have.
        pieces: Copies of the latents in the batch, one for each guidance branch.
        clips: Clips in one piece: the size of its first dimension.
        size: Elements of one piece.
        elements: int64, positions of the recorded elements in one flattened piece; None for all of them.
        dtype: Of the input.
    """

    path: Path
    channel_dim: int | None
    channels: int
    pieces: int
    clips: int
    size: int
    elements: Tensor | None
    dtype: torch.dtype

    @staticmethod
    def of(path: Path, first: Tensor, second: Tensor, output: Tensor) -> MovingInput:
        """Describe an input by its values at two steps and the output's shape.

        The recorded elements are those that moved, at most `MAX_ELEMENTS`, drawn from a fixed seed.
        """
        dim = _channel_dim(first.shape, output.shape)
        channels = 0 if dim is None else min(first.shape[dim], output.shape[dim])
        narrow = MovingInput(path, dim, channels, 1, len(first), first.numel(), None, first.dtype)
        first, second = narrow._narrowed(first), narrow._narrowed(second)
        pieces = next((n for n in range(_MOST_PIECES, 1, -1) if _repeats(first, n) and _repeats(second, n)), 1)
        moved = (first.chunk(pieces)[0] != second.chunk(pieces)[0]).flatten().nonzero().flatten().cpu()
        size = first.numel() // pieces
        elements = None if len(moved) == size else moved
        if len(moved) > MAX_ELEMENTS:
            order = torch.randperm(len(moved), generator=torch.Generator().manual_seed(0))[:MAX_ELEMENTS]
            elements = moved[order.sort().values]
        return dataclasses.replace(narrow, pieces=pieces, clips=max(1, len(first) // pieces), size=size, elements=elements)

    def _narrowed(self, tensor: Tensor) -> Tensor:
        return tensor if self.channel_dim is None else tensor.narrow(self.channel_dim, 0, self.channels)

    def _recorded(self, piece: Tensor) -> Tensor:
        flat = piece.detach().flatten()
        chosen = flat if self.elements is None else flat[self.elements.to(flat.device)]
        return chosen.to("cpu", copy=True)

    def tensor(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Return the input itself; None where a call has none."""
        return float_leaves(args, kwargs).get(self.path)

    def clip_of_elements(self) -> Tensor:
        """Return int64, which clip of its piece each recorded element belongs to."""
        positions = torch.arange(self.size) if self.elements is None else self.elements
        return positions * self.clips // self.size

    def read_input(self, tensor: Tensor) -> Tensor:
        """Return the recorded elements of the latents, on the host."""
        return self._recorded(self._narrowed(tensor).chunk(self.pieces)[0])

    def read_output(self, output: Any) -> tuple[Tensor, ...]:
        """Return the recorded elements of each piece of an output, on the host."""
        return tuple(self._recorded(piece) for piece in self._narrowed(first_output(output)).chunk(self.pieces))

    def replaced(self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a call with this input replaced."""
        leaves, spec = _paths(args, kwargs)
        return pytree.tree_unflatten(list((leaves | {self.path: value}).values()), spec)

    def left_out(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a call without this input, to be kept; the other inputs mostly are the same tensors at each step."""
        return self.replaced(args, kwargs, torch.empty(0))


def _repeats(tensor: Tensor, pieces: int) -> bool:
    """Return whether the batch holds the same latents several times, one copy after another."""
    if len(tensor) % pieces:
        return False
    first, *others = tensor.chunk(pieces)
    return all(torch.equal(first, other) for other in others)
