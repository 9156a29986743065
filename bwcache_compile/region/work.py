"""Count the work of a run of a model: the multiplications and additions of its matrix products, convolutions and attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from bwcache_compile.ir.torch_compat import HigherOrderOperator, TorchDispatchMode


def _int_mm(left: torch.Tensor, right: torch.Tensor, **_: Any) -> int:
    """Return the work of a product of whole numbers, which torch's table leaves out."""
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]


_WORK: Mapping[Any, Any] = {**flop_registry, torch.ops.aten._int_mm: _int_mm}


def is_worth_caching(work: int, largest: int) -> bool:
    """Whether blocks do enough to be cached: a fifth of the largest group's work, or more."""
    return 5 * work >= largest


class WorkCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts work while it is entered.

    torch's own counter cannot be entered around flex_attention that is not compiled. Here such an operator runs as it is and counts
    nothing.

    Attributes:
        total: What was counted so far.
    """

    supports_higher_order_operators = True
    total = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Say that what torch.compile does for itself is not counted."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run an operator and count it."""
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return func(*args, **kwargs)
        formula = _WORK.get(func._overloadpacket)
        if formula is None and func is not torch.ops.prim.device.default:
            with self:  # under inference mode operators arrive here before they are taken apart
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        returned = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=returned)
        return returned
