"""What `transform` takes, and refuses before anything is captured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from torch import nn

from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import ConfigError
from bwcache_compile.ir.compare import Verify
from bwcache_compile.passes import Guard
from bwcache_compile.runtime.hooks import refuse_hooks
from bwcache_compile.runtime.shards import refuse_shards

Capture = Literal["whole", "region", "opaque"]
"""What is captured: the model as one graph, its stacks of blocks, or nothing: then the calls of its blocks are guarded."""

CAPTURES: tuple[Capture, ...] = get_args(Capture)


def block_names(blocks: Sequence[str] | None) -> tuple[str, ...]:
    """Return the paths of blocks that the user named.

    Raises:
        ConfigError: They are no list of paths.
    """
    if blocks is None:
        return ()
    if isinstance(blocks, str) or not blocks or not all(isinstance(name, str) for name in blocks):
        raise ConfigError(f'blocks must be a list of module paths, such as ["transformer_blocks"], got {blocks!r}.')
    return tuple(blocks)


def check_model(model: Any, capture: str) -> None:
    """Refuse what is no model, or one that the asked way of capturing does not take.

    Raises:
        ConfigError: It is such a one.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"transform expects a torch.nn.Module, got {type(model).__name__}.")
    if hasattr(model, "_orig_mod"):
        raise ConfigError("this model is already compiled. Call transform on the original model, then torch.compile on the result.")
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise ConfigError(
            "this model was compiled in place with model.compile(). Call transform on the model before it is compiled, then compile the"
            " result."
        )
    if capture != "opaque":  # which calls the modules as they are
        refuse_hooks(model)
    if capture in ("whole", "region"):
        refuse_shards(model)


def check_arguments(
    config: CacheConfig,
    capture: str,
    guard: str,
    verify: object,
    dynamic_shapes: Any,
    example_args: Any,
    blocks: Sequence[str] | None,
    has_ranks: bool,
) -> None:
    """Check what is asked of `transform`, apart from the model and the settings.

    Raises:
        ConfigError: A value is none of the choices, or two do not go together.
    """
    if guard not in get_args(Guard):
        raise ConfigError(f"guard must be one of {', '.join(map(repr, get_args(Guard)))}, got {guard!r}.")
    config.check_guard(guard)
    if verify not in get_args(Verify):
        raise ConfigError(f"verify must be one of {', '.join(map(repr, get_args(Verify)))}, got {verify!r}.")
    if isinstance(dynamic_shapes, str) and dynamic_shapes != "auto":
        raise ConfigError(f'dynamic_shapes must be "auto", None or what torch.export.export takes, got {dynamic_shapes!r}.')
    if not isinstance(example_args, (tuple, list, type(None))):
        raise ConfigError(f"example_args must be a tuple, such as (latents, timestep), got {type(example_args).__name__}.")
    if capture not in (*CAPTURES, "auto"):
        raise ConfigError(f"capture must be one of {', '.join(map(repr, (*CAPTURES, 'auto')))}, got {capture!r}.")
    if capture != "whole" and (blocks is not None or guard != "host" or dynamic_shapes is not None):
        raise ConfigError(
            f"capture={capture!r} finds the blocks itself and decides on the host: leave out blocks, guard and dynamic_shapes."
        )
    if has_ranks and guard == "graph":
        raise ConfigError(
            "process_group requires guard='host': with the guard in the graph, the ranks' reduction would be inside one arm of torch.cond."
        )
