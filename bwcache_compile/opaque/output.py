"""A model whose anchors are at its output: the call of the model is what is kept, and a reused step runs nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import CaptureError, ConfigError
from bwcache_compile.ir.compare import check_outputs
from bwcache_compile.ir.torch_compat import pytree
from bwcache_compile.opaque.cache import Moment, OpaqueState, ReusedOutputs
from bwcache_compile.opaque.guards import BlockCall, CallPlace, ComputeCalls


def computed_output(
    config: CacheConfig, name: str, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Mapping[CallPlace, BlockCall]]:
    """Run a model; return what it returned, and its call with copies of that.

    Args:
        config: The settings.
        name: Of the model's class.
        run: Runs the model.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Raises:
        CaptureError: It returns an object that may hold tensors, or no tensor.
        ConfigError: It returns a tensor of which there is no sum.
        UnsupportedGraphError: It writes to a tensor that it is given.
    """
    calls, place = ComputeCalls(), CallPlace(name, 0)
    outputs = calls.call(place, run, args, kwargs)
    leaves = calls.done[place].outputs
    check_outputs(name, list(leaves), "a reused step")
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise CaptureError(f"{name} returns no tensor, so there is nothing to reuse.")
    for number, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and not leaf.is_floating_point() and not config.graph_settings.way.any_dtype:
            dtype = str(leaf.dtype).removeprefix("torch.")
            raise ConfigError(
                f"reuse={config.reuse!r} requires floating-point outputs of the model; output {number} of {name} is"
                f" {dtype}{list(leaf.shape)}. Use reuse='output', which holds it."
            )
    return outputs, calls.done


def reused_output(config: CacheConfig, state: OpaqueState, moment: Moment) -> Any:
    """Return what the model returns at a reused step, made of its last computed outputs."""
    ((place, call),) = state.calls.items()
    return pytree.tree_unflatten(ReusedOutputs(config, state, moment)(place), call.out_spec)
