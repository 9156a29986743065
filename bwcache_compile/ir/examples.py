"""Keep the example inputs of a capture, or samples of large ones, and make inputs like them for other steps and sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from bwcache_compile.ir.torch_compat import FakeTensor

Kind = Literal["mask", "whole", "time", "values"]

BUDGET = 2**20
"""Bytes kept of all examples of one capture."""
_SAMPLE = 4096
"""Elements kept of an example that does not fit."""


def _different(values: Tensor) -> int:
    """Count different values; NaN is none."""
    ordered = values.double().flatten().sort().values
    return 1 + int((ordered[1:] != ordered[:-1]).sum())


@dataclasses.dataclass(frozen=True)
class Example:
    """An example input, or a sample of its elements where it is large.

    Attributes:
        values: On the host: the tensor, or some of its elements in one dimension.
        complete: Whether `values` is the whole tensor.
        rank: Of the tensor.
    """

    values: Tensor
    complete: bool
    rank: int

    @property
    def kind(self) -> Kind:
        """What the input is likely to be, judged by its values.

        A `mask` holds at most two different values: flags, ones, or a number per key that is added to scores. Zeros alone tell nothing.
        A `time` is a float of rank 0 or 1. `whole` numbers are indices, lengths and the like.
        """
        values = self.values
        few = values.numel() > 0 and not values.is_complex() and _different(values) <= 2
        if values.dtype == torch.bool:
            return "mask"
        if not (values.is_floating_point() or values.is_complex()):
            return "mask" if self.rank > 1 and few and bool(((values == 0) | (values == 1)).all()) and bool(values.any()) else "whole"
        if self.rank < 2:
            return "time"
        return "mask" if few and bool(values.any()) else "values"


def keep_examples(names: Sequence[str], leaves: Sequence[Any]) -> dict[str, Example]:
    """Keep the tensors among some inputs: small ones whole, as far as the budget allows, and a sample of each of the others."""
    tensors = {
        name: leaf for name, leaf in zip(names, leaves, strict=True) if isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor)
    }
    kept, left = {}, BUDGET
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].nbytes):
        if tensor.device.type == "meta" or tensor.layout != torch.strided:
            continue
        complete = tensor.nbytes <= left
        values = tensor.detach()
        if not complete:
            values = values.flatten()[:: max(1, tensor.numel() // _SAMPLE)][:_SAMPLE]
        values = values.cpu().clone()
        left -= values.nbytes if complete else 0
        kept[name] = Example(values, complete, tensor.dim())
    return kept


def _filled(values: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return a tensor of this shape with the values of another: a copy, tiled if sizes differ, drawn from it if it is a sample."""
    if tuple(values.shape) == tuple(shape):
        return values.clone()
    if values.dim() == len(shape) and values.numel():
        for dimension, size in enumerate(shape):
            values = values.index_select(dimension, torch.arange(size) % values.shape[dimension])
        return values
    flat = values.flatten()
    count = int(torch.Size(shape).numel())
    return flat[torch.randint(max(1, flat.numel()), (count,), generator=generator)].reshape(tuple(shape))


def _drawn(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, dtype=torch.complex64 if dtype.is_complex else torch.float32)


def _padded(values: Tensor) -> Tensor:
    """Return a mask whose last quarter of keys is padding."""
    length = values.shape[-1]
    low = 0 if not values.is_floating_point() else min(0.0, float(values.min()))
    padded = values.clone()
    padded[..., length - max(1, length // 4) :] = low
    return padded


def is_maskable(example: Example | None) -> bool:
    """Whether an input is a mask whose last keys can be taken for padding."""
    return example is not None and example.kind == "mask" and example.rank > 0


def input_at(
    example: Example | None, shape: Sequence[int], dtype: torch.dtype, step: int, generator: torch.Generator, padded: bool = False
) -> Tensor:
    """Return an input like an example, on the host: floats move a little from step to step, masks and whole numbers do not.

    Args:
        example: What was kept; without it floats are drawn, flags are set and whole numbers are 0.
        shape: At the sizes that are wanted.
        dtype: Of the input.
        step: Of the generation.
        generator: For what is drawn; the same at each step.
        padded: Whether the last keys of a mask are padding.
    """
    draws = dtype.is_floating_point or dtype.is_complex
    base, drift = (_drawn(shape, dtype, generator) for _ in range(2)) if draws else (torch.zeros(0), torch.zeros(0))
    if example is None:
        return (base + 0.02 * step * drift).to(dtype) if draws else torch.full(tuple(shape), dtype == torch.bool, dtype=dtype)
    values, kind = _filled(example.values, shape, generator), example.kind
    if kind == "mask":
        fits = padded and is_maskable(example) and values.numel() and values.shape[-1] > 1
        return (_padded(values) if fits else values).to(dtype)
    if kind == "whole":
        return values.to(dtype)
    wide = values.to(base.dtype)
    if kind == "time":  # towards 0, or away from it
        return (wide * (1 - 0.02 * step) + 0.02 * step * (wide == 0)).to(dtype)
    if not bool(wide.any()):
        return (base + 0.02 * step * drift).to(dtype)
    spread = wide.std(correction=0)
    spread = spread if bool(torch.isfinite(spread)) and float(spread) > 0 else torch.ones(())
    return (wide + 0.02 * step * spread * drift).to(dtype)
