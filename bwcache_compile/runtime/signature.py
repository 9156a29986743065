"""What makes two calls need the same program, and two weights the same weights."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bwcache_compile.errors import ConfigError, StateError

Call = tuple[tuple[Any, ...], dict[str, Any]]


def ordered(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Sort the keywords: their order in a call means nothing."""
    return args, dict(sorted(kwargs.items()))


def _leaf_key(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return (tuple(leaf.shape), leaf.dtype, leaf.device)
    if leaf is None or isinstance(leaf, (bool, int, float, str, bytes, torch.dtype, torch.device)):
        return (type(leaf), leaf)
    raise ConfigError(
        f"an input is a {type(leaf).__name__}; a program is chosen by tensors, numbers, strings and None. Pass the tensors"
        " that it holds, or register its class with torch.utils._pytree.register_pytree_node."
    )


def call_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    """Describe a call: structure, shapes, dtypes, devices, constants and the autocast state.

    Raises:
        ConfigError: An input is neither a tensor nor a plain constant.
        StateError: An input requires gradients.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    if torch.is_grad_enabled() and any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
        raise StateError("an input requires gradients, and a reused step has none to give. Call the model under torch.no_grad().")
    autocast = tuple(
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        for device in sorted({leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)})
    )
    return (str(spec), tuple(map(_leaf_key, leaves)), autocast)


def same_moment(earlier: list[Any], later: list[Any]) -> bool:
    """Whether two calls are at the same denoising step: nothing but latents and embeddings (rank 3 and more) differs.

    False where no input of lower rank could tell. Half-precision timesteps repeat from step to step and cannot tell.
    """
    told = False
    for old, new in zip(earlier, later, strict=False):
        if not isinstance(new, Tensor):
            if type(old) is not type(new) or old != new:
                return False
        elif new.dim() <= 2:
            if new.dtype in (torch.float16, torch.bfloat16) or not torch.equal(old, new):
                return False
            told = True
    return told


def tree_key(model: nn.Module) -> int:
    """Identify the modules and tensors that a captured graph holds on to: replacing one makes the graph stale."""
    return hash((*(id(m) for m in model.modules()), *(id(p) for p in model.parameters()), *(id(b) for b in model.buffers())))


def weights_version(model: nn.Module) -> int:
    """Count the in-place writes to the weights; loading a state dict moves it, an edit through `.data` does not."""
    return sum(0 if p.is_inference() else p._version for p in model.parameters())
