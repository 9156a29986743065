"""Run one step as a function of the inputs, the state and the policy's settings. Nothing is stored or reported."""

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


def first_state(match: ProgramMatch) -> CacheState | GuardedState:
    """Return the state before the first step."""
    state = match.loaded.fresh(match.sizes)
    if match.loaded.guarded:
        return GuardedState(state.slots, match.loaded.step_tensor(0), match.version)
    return dataclasses.replace(state, version=match.version)


def check_state(match: ProgramMatch, state: CacheState | GuardedState) -> None:
    """Refuse a state that was made by another program, at other sizes or with other weights.

    Raises:
        StateError: It is such a state.
    """
    runnable = match.loaded
    given = [(tuple(t.shape), t.dtype) for t in state.slots]
    if given != [(evaluated(slot.shape, match.sizes), slot.dtype) for slot in runnable.slots]:
        raise StateError("this state was made for inputs of other shapes or dtypes. Create a new one with init_state.")
    if state.version not in (None, match.version):
        raise StateError("the model's weights or modules changed since this state was made. Create a new one with init_state.")


def check_inputs(runnable: RunnableProgram, flat: Sequence[Any]) -> None:
    """Refuse inputs of another shape or dtype than those of the capture, by comparisons that torch.compile evaluates once.

    Raises:
        StateError: A shape or dtype differs.
    """
    for name, leaf, expected in zip(runnable.program.signature.inputs, flat, runnable.input_kinds, strict=True):
        if isinstance(leaf, Tensor) and expected is not None and (tuple(leaf.shape), leaf.dtype) != expected:
            raise StateError(
                f"{name} is {leaf.dtype}{list(leaf.shape)}, but the program was captured for {expected[1]}{list(expected[0])}."
            )


def host_step(runnable: RunnableProgram, flat: Sequence[Any], state: CacheState, parameters: tuple[Tensor, ...]) -> tuple[Any, CacheState]:
    """Run the graph that the state asks for."""
    with torch.no_grad():
        returned = call_directly(runnable.graph(runnable.kind(state)), runnable.operands(flat, state, parameters))
    outputs, following, _ = runnable.split(returned, state)
    return outputs, following


def guarded_step(
    runnable: RunnableProgram, flat: Sequence[Any], state: GuardedState, parameters: tuple[Tensor, ...]
) -> tuple[Any, GuardedState]:
    """Run the graph that contains the guard. An outer `torch.compile(fullgraph=True)` can trace this function."""
    io = runnable.io["guarded"]
    operands = io.pack(runnable.named(io, flat, state.slots, parameters, state.step))
    with torch.no_grad():
        returned = io.unpack(runnable.graphs["guarded"](*operands))
    return runnable.results(io, returned), GuardedState(tuple(runnable.written(returned)), state.step + 1, state.version)
