"""Compare what two models return, step by step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bwcache_compile.context_methods import ContextMethods
from bwcache_compile.errors import ConfigError
from bwcache_compile.ir.compare import as_tensor, clone_tensors, relative_error
from bwcache_compile.ir.tree_paths import Path, output_name

_CONTEXT = "assert_same_outputs"


def _leaves(tree: Any, path: Path = ()) -> Iterator[tuple[str, Any]]:
    """Yield the name and the value of every leaf of an output; a session's outputs too, which are in no class that torch knows."""
    inside: Iterable[tuple[Any, Any]]
    if isinstance(tree, Mapping):
        inside = tree.items()
    elif isinstance(tree, (list, tuple)):
        inside = enumerate(tree)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        inside = [(field.name, getattr(tree, field.name)) for field in dataclasses.fields(tree)]
    else:
        if tree is not None:
            yield output_name(path), tree
        return
    for key, value in inside:
        yield from _leaves(value, (*path, key if isinstance(key, int) else str(key)))


def _call_of(call: Any, step: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    match call:
        case (tuple() as args, dict() as kwargs):
            return args, kwargs
        case tuple():
            return call, {}
        case dict():
            return (), call
    raise ConfigError(f"calls[{step}] must be a tuple of arguments, a dictionary of them by name, or a pair of both, got {call!r}.")


def _run(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not isinstance(model, ContextMethods):
        return model(*args, **kwargs)
    with model.cache_context(_CONTEXT):
        return model(*args, **kwargs)


def _did(model: Any) -> str:
    """Say whether the last step of a cached model or a session computed."""
    if not isinstance(model, ContextMethods):
        return ""
    steps = model.report().contexts[_CONTEXT].steps  # type: ignore[attr-defined]
    return f"\n  {type(model).__name__} {'computed' if steps[-1].computed else 'reused'} this step."


def _difference(name: str, got: Any, want: Any, tolerance: float) -> str | None:
    if isinstance(want, str) or isinstance(got, str):
        return None if got == want else f"the output {name} is {got!r}, expected {want!r}."
    got, want = (value.numpy() if hasattr(value, "numpy") and not isinstance(value, Tensor) else value for value in (got, want))
    error = relative_error(got, want)
    if error <= tolerance:
        return None
    got, want = as_tensor(got), as_tensor(want)
    if (got.shape, got.dtype) != (want.shape, want.dtype):
        return f"the output {name} is {got.dtype} {list(got.shape)}, expected {want.dtype} {list(want.shape)}."
    wide = torch.complex128 if want.is_complex() else torch.float64
    apart = (got.to(wide) - want.to(wide)).abs()
    apart[got.isnan() & want.isnan()] = 0
    apart[apart.isnan()] = float("inf")
    place = [int(i) for i in torch.unravel_index(apart.argmax(), apart.shape)]
    return (
        f"the output {name} differs by up to {apart.max().item():.3g} at {place}, where {got[tuple(place)].item():.7g} is returned and"
        f" {want[tuple(place)].item():.7g} expected.\n  That is {error:.3g} of its largest value; the tolerance is {tolerance:g}."
        f" {int((apart > 0).sum())} of {apart.numel()} values differ."
    )


def assert_same_outputs(
    model: Callable[..., Any], cached: Callable[..., Any], calls: Iterable[Any], *, tolerance: float = 0.0, num_steps: int | None = None
) -> None:
    """Run two models on the same calls, one step after the other, and check that they return the same.

    Models with a cache begin a new generation, and the calls are the steps of one context of its own.

    Args:
        model: What is right: the original, or a cached model to hold a session against. Anything that is called like a model.
        cached: A cached model, a session of a bundle, or anything that is called like one.
        calls: What both are called with: a tuple of arguments, a dictionary of arguments by name, or a pair of both for each step.
        tolerance: Largest difference, relative to the largest value of each output; 0 asks for the same bits.
        num_steps: Steps of the generation, where a policy needs it and the settings do not say.

    Raises:
        AssertionError: They differ. The message names the step, the output, the largest difference and where it is, and whether
            the step was computed.
        ConfigError: There is no call, or one that is none.
    """
    __tracebackhide__ = True
    for one in (model, cached):
        if isinstance(one, ContextMethods):
            one.reset(num_steps)
    step = -1
    for step, call in enumerate(calls):
        args, kwargs = _call_of(call, step)
        with torch.no_grad():
            expected = dict(_leaves(_run(model, clone_tensors(args), clone_tensors(kwargs))))
            actual = dict(_leaves(_run(cached, clone_tensors(args), clone_tensors(kwargs))))
        if expected.keys() != actual.keys():
            raise AssertionError(f"step {step}: expected the outputs {', '.join(expected)}, got {', '.join(actual)}.")
        for name, want in expected.items():
            wrong = _difference(name, actual[name], want, tolerance)
            if wrong is not None:
                raise AssertionError(f"step {step}: {wrong}{_did(cached)}")
    if step < 0:
        raise ConfigError("calls is empty, so nothing would be compared.")
