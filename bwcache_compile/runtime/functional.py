"""One step as a function of the inputs, the state and the policy's settings: nothing is kept, nothing is reported."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bwcache_compile.errors import StateError
from bwcache_compile.runtime.frames import call_directly
from bwcache_compile.runtime.programs import ProgramMatch
from bwcache_compile.runtime.runnable import RunnableProgram
from bwcache_compile.runtime.state import CacheState, GuardedState
from bwcache_compile.size_expressions import evaluated


def first_state(fit: ProgramMatch) -> CacheState | GuardedState:
    """Return the state before the first step."""
    state = fit.loaded.fresh(fit.sizes)
    if fit.loaded.guarded:
        return GuardedState(state.slots, fit.loaded.step_tensor(0), fit.version)
    return dataclasses.replace(state, version=fit.version)


def check_state(fit: ProgramMatch, state: CacheState | GuardedState) -> None:
    """Refuse a state that another program made, or the same one at other sizes or with other weights.

    Raises:
        StateError: It does not fit.
    """
    loaded = fit.loaded
    given = [(tuple(t.shape), t.dtype) for t in state.slots]
    if given != [(evaluated(slot.shape, fit.sizes), slot.dtype) for slot in loaded.slots]:
        raise StateError("this state was made for inputs of other shapes or dtypes. Create a new one with init_state.")
    if state.version not in (None, fit.version):
        raise StateError("the model's weights or modules changed since this state was made. Create a new one with init_state.")


def check_inputs(loaded: RunnableProgram, flat: Sequence[Any]) -> None:
    """Refuse inputs that the program was not captured for; made of plain comparisons, which compiled code does once.

    Raises:
        StateError: A shape or dtype differs.
    """
    for name, leaf, expected in zip(loaded.program.signature.inputs, flat, loaded.input_kinds, strict=True):
        if isinstance(leaf, Tensor) and expected is not None and (tuple(leaf.shape), leaf.dtype) != expected:
            raise StateError(
                f"{name} is {leaf.dtype}{list(leaf.shape)}, but the program was captured for {expected[1]}{list(expected[0])}."
            )


def host_step(loaded: RunnableProgram, flat: Sequence[Any], state: CacheState, parameters: tuple[Tensor, ...]) -> tuple[Any, CacheState]:
    """Run the graph that the state asks for."""
    with torch.no_grad():
        returned = call_directly(loaded.graph(loaded.kind(state)), loaded.operands(flat, state, parameters))
    outputs, following, _ = loaded.split(returned, state)
    return outputs, following


def guarded_step(
    loaded: RunnableProgram, flat: Sequence[Any], state: GuardedState, parameters: tuple[Tensor, ...]
) -> tuple[Any, GuardedState]:
    """Run the graph that decides by itself. Traced as it stands by an outer `torch.compile(fullgraph=True)`."""
    io = loaded.io["guarded"]
    operands = io.pack(loaded.named(io, flat, state.slots, parameters, state.step))
    with torch.no_grad():
        returned = io.unpack(loaded.graphs["guarded"](*operands))
    return loaded.results(io, returned), GuardedState(tuple(loaded.written(returned)), state.step + 1, state.version)
