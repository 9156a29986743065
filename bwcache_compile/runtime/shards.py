"""Refuse models whose weights are sharded: no graph is made of those."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from bwcache_compile.errors import ConfigError

_ADVICE = (
    '\n  Call transform(model, capture="opaque", process_group=...), which calls the modules as they are. A model that holds plain tensors,'
    " its part of them, and calls the functional collectives of torch.distributed is captured whole."
)


def _class(module: str, name: str) -> Any:
    """Return a class of torch.distributed; of a module that nothing has imported there are no instances."""
    return getattr(sys.modules.get(module), name, ())


def refuse_shards(model: nn.Module) -> None:
    """Refuse a model that FSDP or tensor parallelism has sharded.

    Raises:
        ConfigError: A module gathers its weights by itself (FSDP1, FSDP2), or a parameter is a DTensor.
    """
    kind = type(model).__name__
    for name, module in model.named_modules():
        if isinstance(module, _class("torch.distributed.fsdp", "FullyShardedDataParallel")):
            raise ConfigError(
                f"{f'module {name}' if name else 'the top module'} of {kind} is sharded by FullyShardedDataParallel, which gathers the"
                f" weights in Python for each forward, and exporting it damages it.{_ADVICE}"
            )
        if isinstance(module, _class("torch.distributed.fsdp", "FSDPModule")):
            raise ConfigError(
                f"{f'module {name}' if name else 'the top module'} of {kind} is sharded by fully_shard, whose hooks gather the weights for"
                f" each forward, and a graph cannot hold such hooks.{_ADVICE}"
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, _class("torch.distributed.tensor", "DTensor")):
            raise ConfigError(
                f"parameter {name} of {kind} is a DTensor (tensor parallelism, parallelize_module), and torch.export takes no model with"
                f" DTensors.{_ADVICE}"
            )
