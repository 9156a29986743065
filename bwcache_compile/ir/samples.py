"""The samples of a batch in a graph: how many there are, and functions of one sample applied to each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Node
from torch.overrides import TorchFunctionMode

from bwcache_compile.errors import UnsupportedGraphError
from bwcache_compile.ir.graph_text import format_value
from bwcache_compile.ir.program import ModelProgram
from bwcache_compile.ir.torch_compat import statically_known_true

_MOST_SLICES = 64
"""Slices that a concatenation is taken apart into."""


def sample_count(program: ModelProgram) -> int | SymInt | None:
    """Return the samples of a batch: dimension 0 of the first floating output. None if there is no such output."""
    returned = program.captured.graph.output_node().all_input_nodes
    values = (node.meta.get("val") for node in returned)
    return next((v.shape[0] for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 0), None)


def check_samples(program: ModelProgram, values: Sequence[Node], batch_reduce: str) -> int | SymInt:
    """Return the samples of a batch, after checking that these values hold one sample after the other along dimension 0.

    Raises:
        UnsupportedGraphError: A value cannot.
    """
    count = sample_count(program)
    if count is None:
        raise UnsupportedGraphError(
            f"{program.model_name} cannot be cached with batch_reduce={batch_reduce!r}: it returns no floating tensor whose dimension 0"
            " is the batch. Use batch_reduce='joint'."
        )
    for node in values:
        value = node.meta["val"]
        if value.dim() == 0 or not statically_known_true(value.shape[0] % count == 0):
            raise UnsupportedGraphError(
                f"{program.model_name} cannot be cached with batch_reduce={batch_reduce!r}: `{node.name}` {format_value(value)}, which the"
                f" blocks return, does not hold the {count} samples of the batch along dimension 0. Use batch_reduce='joint'."
            )
    return count


class _ConcatenatedByStacking(TorchFunctionMode):
    """Concatenates by stacking slices: `torch.vmap` fixes a dynamic batch size where tensors are concatenated."""

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if function not in (torch.cat, torch.concat, torch.concatenate):
            return function(*args, **kwargs)
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        tensors = args[0] if args else kwargs["tensors"]
        sizes = [tensor.shape[dim] for tensor in tensors]
        if not all(isinstance(size, int) for size in sizes) or sum(sizes) > _MOST_SLICES:
            return function(*args, **kwargs)
        return torch.stack([part for tensor in tensors for part in tensor.unbind(dim)], dim)


def each_sample(function: Callable[..., Any], what: str) -> Callable[..., tuple[Tensor, ...]]:
    """Apply a function of one sample's tensors to each sample of a batch.

    The function that is returned takes the number of samples, or a tensor whose dimension 0 it is, and then the operands, each with the
    samples joined along dimension 0. So are the results; one that is an operand is returned as it is.

    Args:
        function: Of tensors, to a tensor or several. It is traced, and must not branch on values.
        what: Names it in errors.
    """

    def apply(first: int | SymInt | Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
        count = first.shape[0] if isinstance(first, Tensor) else first
        same: list[int | None] = []

        def of_one(*values: Tensor) -> tuple[Tensor, ...]:
            returned = function(*values)
            results = tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)
            same[:] = [next((i for i, value in enumerate(values) if value is result), None) for result in results]
            return results

        parts = [value.reshape(count, value.shape[0] // count, *value.shape[1:]) for value in operands]
        try:
            with _ConcatenatedByStacking():
                results = torch.vmap(of_one)(*parts)
        except (RuntimeError, ValueError) as error:
            raise UnsupportedGraphError(f"{what} cannot be applied to each sample of a batch: {str(error).splitlines()[0]}") from error
        if isinstance(count, SymInt) and count.node.expr.is_number:
            raise UnsupportedGraphError(f"{what} cannot be applied to batches of dynamic size: an operator in it fixes the size.")
        return tuple(
            result.reshape(count * result.shape[1], *result.shape[2:]) if place is None else operands[place]
            for place, result in zip(same, results, strict=True)
        )

    return apply
