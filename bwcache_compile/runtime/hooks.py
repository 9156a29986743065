"""Refuse models whose modules have hooks of accelerate or diffusers."""

from __future__ import annotations

from typing import Any

from torch import nn

from bwcache_compile.errors import ConfigError

HOOK_REGISTRY = "_diffusers_hook"
"""Attribute in which diffusers keeps the hooks of a module; a pipeline leaves it behind after a run, even without hooks."""


_CONTEXT_PARALLEL = frozenset({"ContextParallelSplitHook", "ContextParallelGatherHook"})
"""Hooks of diffusers that only cut tensors and gather them over ranks: a graph holds these operators like the model's own."""


def hook_kinds(module: nn.Module) -> list[str]:
    """Return the classes of the hooks that accelerate and diffusers put on a module; those of `enable_parallelism` are left out."""
    hook = getattr(module, "_hf_hook", None)
    registry = getattr(module, HOOK_REGISTRY, None)
    kinds = [type(h).__name__ for h in (hook, *(getattr(registry, "hooks", None) or {}).values()) if h is not None]
    return [kind for kind in kinds if kind not in _CONTEXT_PARALLEL]


def refuse_hooks(model: nn.Module) -> None:
    """Refuse a model that offloads its weights, or whose modules have hooks of other libraries.

    Raises:
        ConfigError: A parameter has no data here, or accelerate or diffusers put a hook on a module.
    """
    kind = type(model).__name__
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ConfigError(
                f"parameter {name} of {kind} is on the meta device: an offload hook moves its data in and out, and a captured"
                ' graph would keep copies of it. Place the whole model on one device first, or call transform(model, capture="opaque").'
            )
    for name, module in model.named_modules():
        if kinds := hook_kinds(module):
            raise ConfigError(
                f"{f'module {name}' if name else 'the top module'} of {kind} has a hook on its forward ({', '.join(kinds)})."
                " Offloading, casting and other caches use such hooks; a captured graph would skip them or keep copies of the"
                " weights. Remove the hook first (for offloading: place the whole model on one device, or call transform(model,"
                ' capture="opaque")).'
            )


def is_only_empty_registry(table: Any, entries: frozenset[Any]) -> bool:
    """Whether the only new entry is a hook registry of diffusers that has no hooks: a pipeline leaves one behind after a run."""
    if not isinstance(table, dict) or table.keys() - entries != {HOOK_REGISTRY} or entries - table.keys():
        return False
    return not getattr(table[HOOK_REGISTRY], "hooks", None)
