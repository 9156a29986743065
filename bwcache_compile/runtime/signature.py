"""Describe calls; calls with equal keys are served by the same program."""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import sys
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from bwcache_compile.errors import ConfigError, StateError
from bwcache_compile.ir.layout import memory_order
from bwcache_compile.ir.sizes import CallSizes
from bwcache_compile.ir.torch_compat import is_any_autocast_enabled, pytree

Call = tuple[tuple[Any, ...], dict[str, Any]]


class CallKey(NamedTuple):
    """What a call looks like. Calls of one kind differ in sizes alone, and a program of dynamic sizes may serve them all.

    `values` holds what a program read in Python of the call's tensors, by position.
    """

    kind: tuple[Hashable, tuple[Hashable, ...], Hashable]
    sizes: CallSizes
    values: tuple[tuple[int, Hashable], ...] = ()


@functools.lru_cache(256)
def generation_kind(kind: tuple[Hashable, tuple[Hashable, ...], Hashable]) -> Hashable:
    """Return a call's kind without layouts, and without the float dtypes of inputs that may be the time.

    A scheduler may hand over float32 times first and bfloat16 times later in one run, and latents of another layout.
    """

    def in_one_run(leaf: Hashable) -> Hashable:
        if not isinstance(leaf, tuple) or len(leaf) != 4:
            return leaf
        rank, dtype, device, _ = leaf
        return (rank, "floating" if rank <= 2 and dtype.is_floating_point else dtype, device)

    structure, leaves, modes = kind
    return structure, tuple(map(in_one_run, leaves)), modes


def changed_numbers(before: CallKey, now: CallKey) -> dict[int, tuple[Any, Any]]:
    """Return the Python numbers that changed between two calls, by position; nothing where anything else changed too."""
    changed: dict[int, tuple[Any, Any]] = {}
    if (before.kind[0], before.kind[2]) != (now.kind[0], now.kind[2]):
        return {}
    for i, (was, kind, old, new) in enumerate(zip(before.kind[1], now.kind[1], before.sizes, now.sizes, strict=True)):
        if kind is int and was is int:
            changed |= {i: (old, new)} if old != new else {}
        elif isinstance(was, tuple) and isinstance(kind, tuple) and was[0] is kind[0] is float:
            changed |= {i: (was[1], kind[1])} if was != kind else {}
        elif (was, old) != (kind, new):
            return {}
    return changed


@dataclasses.dataclass(frozen=True)
class Parameters:
    """The parameters of a model's forward, which give a call one form, however its arguments are passed.

    Attributes:
        leading: How many parameters can only be passed by position.
        names: Those that can be passed by position and by name, in order.
        order: Every parameter that can be passed by name, in order.
    """

    leading: int
    names: tuple[str, ...]
    order: tuple[str, ...]

    @staticmethod
    def of(model: nn.Module) -> Parameters:
        """Read the signature of a model's forward; there are no names if a decorator hides it, or if the model is a graph module."""
        if isinstance(model, GraphModule):
            return Parameters(0, (), ())
        parameters = inspect.signature(model.forward, follow_wrapped=False).parameters.values()
        names = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
        only = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        return Parameters(sum(p.kind is p.POSITIONAL_ONLY for p in parameters), names, (*names, *only))

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Return a call in its one form: everything that has a name by name, in the order of the signature.

        Arguments that forward would refuse, and those of `*args`, are left as they are.
        """
        named = args[self.leading :]
        if self.names and len(named) <= len(self.names) and not any(name in kwargs for name in self.names[: len(named)]):
            args, kwargs = args[: self.leading], {**dict(zip(self.names, named, strict=False)), **kwargs}
        rest = [name for name in sorted(kwargs) if name not in self.order]
        return args, {name: kwargs[name] for name in (*self.order, *rest) if name in kwargs}


_PLAIN = frozenset({Tensor, nn.Parameter, int, float, bool, str, type(None)})
_LEAVES = (Tensor, int, float, str, bytes, enum.Enum, torch.dtype, torch.device, type(None))


def leaves_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Hashable]:
    """Return the leaves of a call and its structure. Calls without containers skip pytree, which takes ten times as long.

    Raises:
        ConfigError: An input is neither a tensor nor a plain constant.
    """
    leaves = [*args, *kwargs.values()]
    if _PLAIN.issuperset(map(type, leaves)):
        return leaves, (len(args), *kwargs)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    if not all(isinstance(leaf, _LEAVES) for leaf in leaves):
        _refuse_types(args, kwargs)
    return leaves, str(spec)


def _refuse_types(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Say which argument holds something else than tensors and constants."""
    named = [(f"positional argument {place}", value) for place, value in enumerate(args)] + list(kwargs.items())
    name, kind = next((name, type(leaf)) for name, value in named for leaf in pytree.tree_leaves(value) if not isinstance(leaf, _LEAVES))
    advice = "Convert it with torch.as_tensor."
    if not hasattr(kind, "__array__"):
        advice = (
            "Pass the tensors that it holds, or register its class: torch.export.register_dataclass for a dataclass, else"
            " torch.utils._pytree.register_pytree_node."
        )
    raise ConfigError(
        f"{name}: unsupported input type {kind.__name__}; inputs are tensors, numbers, strings, None and containers of these. {advice}"
    )


def _leaf_size(leaf: Any) -> tuple[int, ...] | int | None:
    """Return a tensor's shape or an int's value: pipelines pass frames, height and width as plain ints."""
    return tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf if type(leaf) is int else None


def _layout(tensor: Tensor) -> Hashable:
    """Return the memory layout of a tensor, for which kernels may round differently; None if it is contiguous or of rank 1."""
    if tensor.dim() < 2 or tensor.is_contiguous():
        return None
    return memory_order(tensor) or "strided"


def _leaf_kind(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return (leaf.dim(), leaf.dtype, leaf.device, _layout(leaf))
    if type(leaf) is int:
        return int
    return (type(leaf), leaf)


def _attention_backend() -> str:
    """Name what diffusers' attention is switched to, which Python reads while a model is traced.

    PyTorch's own switch (`torch.nn.attention.sdpa_kernel`) is read when a graph runs, so it needs no graph of its own.
    """
    registry = getattr(sys.modules.get("diffusers.models.attention_dispatch"), "_AttentionBackendRegistry", None)
    return str(getattr(registry, "_active_backend", ""))


def call_key(leaves: Sequence[Any], structure: Hashable) -> CallKey:
    """Describe a call: structure, shapes, dtypes, devices, constants, autocast and attention back end.

    Args:
        leaves: From `leaves_of`.
        structure: From `leaves_of`.

    Raises:
        StateError: An input requires gradients.
    """
    if torch.is_grad_enabled() and any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
        raise StateError("an input requires gradients, which a reused step cannot provide. Call the model under torch.no_grad().")
    autocast: tuple[Any, ...] = ()
    if is_any_autocast_enabled():
        devices = sorted({leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)})
        autocast = tuple((device, torch.get_autocast_dtype(device)) for device in devices if torch.is_autocast_enabled(device))
    modes = (autocast, _attention_backend())
    return CallKey((structure, tuple(map(_leaf_kind, leaves)), modes), tuple(map(_leaf_size, leaves)))
