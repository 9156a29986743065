"""Make videos with a model in torch: its own sampler, a function that the user names, or Euler steps over the example inputs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bwcache_compile.cli.motion import Input, Motion, motion
from bwcache_compile.cli.outcome import CommandError
from bwcache_compile.cli.source import Source, called, find_callable
from bwcache_compile.ir.compare import flat_outputs
from bwcache_compile.ir.torch_compat import pytree
from bwcache_compile.ir.tree_paths import leaf_paths
from bwcache_compile.runtime.cached_model import CachedModel

_SHORT = 64
"""Elements up to which the first number of a tensor is looked at."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """How a video is made.

    Attributes:
        how: In words.
        make: Makes one with the model that it is given.
        moves: Whether latents move from step to step, as far as it is known.
    """

    how: str
    make: Callable[[Any], Any]
    moves: bool = True


def generation(source: Source, sampler: str | None, steps: int, on_step: Callable[[], None] = lambda: None) -> Generation:
    """Return what makes a video: the function that the user named, the source's own sampler, or Euler steps over the example inputs.

    Args:
        source: The model and its example inputs.
        sampler: What the user named with --generate.
        steps: Of a generation; a function that the user names has its own.
        on_step: Called after each step, unless the user's function makes them.

    Raises:
        UsageError: There is no such function.
        CommandError: The model failed, or returns no tensor.
    """
    if sampler is not None:
        return Generation(sampler, functools.partial(called, sampler, find_callable(sampler)))
    if source.generate is not None:
        own = source.generate
        return Generation(f"the sampler of {source.named}, {steps} steps", lambda model: own(model, steps, on_step))
    loop = EulerLoop(source, steps)
    how = f"{steps} steps over the example inputs: {loop.moves}"
    return Generation(how, lambda model: loop.run(model, on_step), loop.moves.latents is not None)


class EulerLoop:
    """Calls of a model, step after step: what an output has the shape of moves, the time runs down, all else stays."""

    def __init__(self, source: Source, steps: int) -> None:
        """Run the model once to see what it returns."""
        self._leaves, self._spec = pytree.tree_flatten((source.args, source.kwargs))
        names = list(inspect.signature(source.model.forward).parameters)
        self._places: dict[str, int] = {}
        for i, (side, first, *rest) in enumerate(leaf_paths(self._spec)):
            if isinstance(self._leaves[i], Tensor):
                parameter = names[first] if side == 0 and isinstance(first, int) and first < len(names) else first
                self._places[".".join(map(str, (parameter, *rest)))] = i
        output = self._output(called(source.named, functools.partial(self._call, source.model, self._leaves)))
        self.moves: Motion = motion({name: _described(self._leaves[i]) for name, i in self._places.items()}, tuple(output.shape), steps)

    def _call(self, model: Any, leaves: list[Any]) -> Any:
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        with torch.no_grad():
            return model(*args, **kwargs)

    def _output(self, returned: Any) -> Tensor:
        for value in flat_outputs(returned):
            if isinstance(value, Tensor):
                return value
        raise CommandError(f"the model returned {type(returned).__name__} without a tensor in it")

    def run(self, model: Any, on_step: Callable[[], None]) -> Tensor:
        """Make a video: the latents at the end, or the last output where the model has none."""
        leaves, moves = list(self._leaves), self.moves
        output = torch.zeros(0)
        for step, now in enumerate(moves.times):
            if moves.time is not None:
                place = self._places[moves.time]
                leaves[place] = torch.full_like(leaves[place], now if leaves[place].is_floating_point() else round(now))
            with _context(model, step, len(moves.times)):
                output = self._output(self._call(model, leaves))
            if moves.latents is not None:
                place = self._places[moves.latents]
                leaves[place] = moves.advanced(leaves[place], output)
            on_step()
        return output if moves.latents is None else leaves[self._places[moves.latents]]


def _context(model: Any, step: int, steps: int) -> contextlib.AbstractContextManager[None]:
    """Tell a cached model which step it is: not every model has an input that says so."""
    if isinstance(model, CachedModel):
        return model.cache_context("default", step_index=step, num_inference_steps=steps)
    return contextlib.nullcontext()


def _described(tensor: Tensor) -> Input:
    readable = 0 < tensor.numel() <= _SHORT and not tensor.is_complex()
    return Input(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), float(tensor.flatten()[0]) if readable else 0.0)
