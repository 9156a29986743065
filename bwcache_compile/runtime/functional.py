"""Run one step as a function of the inputs, the state and the policy's settings. Nothing is stored or reported."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import ConfigError, StateError
from bwcache_compile.ir.torch_compat import pytree
from bwcache_compile.runtime.compilation import owned
from bwcache_compile.runtime.frames import call_directly
from bwcache_compile.runtime.match import ProgramMatch
from bwcache_compile.runtime.programs import ProgramCache
from bwcache_compile.runtime.runnable import RunnableProgram
from bwcache_compile.runtime.state import CacheState, GuardedState
from bwcache_compile.size_expressions import evaluated


def first_state(match: ProgramMatch) -> CacheState | GuardedState:
    """Return the state before the first step."""
    state = match.runnable.fresh(match.sizes)
    if match.runnable.guarded:
        return GuardedState(state.slots, match.runnable.step_tensor(0), match.version)
    return dataclasses.replace(state, version=match.version)


def functional_step(
    programs: ProgramCache,
    config: CacheConfig,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    state: CacheState | GuardedState,
    parameters: tuple[Tensor, ...] | None,
) -> tuple[Any, CacheState | GuardedState]:
    """Return the model's output and the state after a step; see `CachedModel.functional_step`.

    Args:
        programs: Those of the model.
        config: The model's own settings.
        args: Positional arguments of the model, as its forward declares them.
        kwargs: Keyword arguments of the model.
        state: From `first_state` or the step before.
        parameters: Those of the settings if not given.

    Raises:
        ConfigError: `torch.compile` traces the step, and `parameters` is not given.
        StateError: The state belongs to other inputs.
    """
    flat = pytree.tree_leaves((args, kwargs))
    if isinstance(state, GuardedState) and torch.compiler.is_compiling():
        if parameters is None:
            raise ConfigError(
                "inside torch.compile, pass parameters=cached.policy_parameters() to cached.functional_step: settings are inputs of"
                " the graph."
            )
        _check_inputs(programs.only, flat)
        return _guarded_step(programs.only, flat, state, programs.only.taken("guarded", parameters))
    match = programs.match(args, kwargs, config)
    _check_state(match, state)
    runnable = match.runnable
    kind = "guarded" if isinstance(state, GuardedState) else runnable.kind(state)
    own = runnable.parameters(config, config.steps, kind) if parameters is None else runnable.taken(kind, parameters)
    with programs.gate.running():
        if isinstance(state, GuardedState):
            return _guarded_step(runnable, flat, state, own, runnable.replays())
        return _host_step(runnable, kind, flat, state, own)


def _check_state(match: ProgramMatch, state: CacheState | GuardedState) -> None:
    """Refuse a state that was made by another program, at other sizes or with other weights.

    Raises:
        StateError: It is such a state.
    """
    runnable = match.runnable
    given = [(tuple(t.shape), t.dtype) for t in state.slots]
    if given != [(evaluated(slot.shape, match.sizes), slot.dtype) for slot in runnable.slots]:
        raise StateError(
            "this state was made for inputs of other shapes or dtypes. Create a new one for these inputs with cached.init_state."
        )
    if state.version not in (None, match.version):
        raise StateError("the model's weights or modules changed since this state was made. Create a new one with cached.init_state.")


def _check_inputs(runnable: RunnableProgram, flat: Sequence[Any]) -> None:
    """Refuse inputs of another shape or dtype than those of the capture, by comparisons that torch.compile evaluates once.

    Raises:
        StateError: A shape or dtype differs.
    """
    for name, leaf, expected in zip(runnable.program.signature.inputs, flat, runnable.input_kinds, strict=True):
        if isinstance(leaf, Tensor) and expected is not None and (tuple(leaf.shape), leaf.dtype) != expected:
            raise StateError(
                f"{name} is {leaf.dtype}{list(leaf.shape)}, but the program was captured for {expected[1]}{list(expected[0])}."
            )


def _host_step(
    runnable: RunnableProgram, kind: str, flat: Sequence[Any], state: CacheState, parameters: tuple[Tensor, ...]
) -> tuple[Any, CacheState]:
    """Run the graph that the state asks for, on those of the settings that it takes."""
    with torch.no_grad():
        returned = call_directly(runnable.graph(kind), runnable.operands(flat, state, parameters))
    outputs, following, _ = runnable.split(returned, state, runnable.replays())
    return outputs, following


def _guarded_step(
    runnable: RunnableProgram, flat: Sequence[Any], state: GuardedState, parameters: tuple[Tensor, ...], replayed: bool = False
) -> tuple[Any, GuardedState]:
    """Run the graph that contains the guard. An outer `torch.compile(fullgraph=True)` can trace this function, which copies nothing."""
    io = runnable.io["guarded"]
    operands = io.pack(runnable.named(io, flat, state.slots, parameters, state.step))
    with torch.no_grad():
        values = runnable.graphs["guarded"](*operands)
        returned = io.unpack(owned(values, state.slots) if replayed else values)
    return runnable.results(io, returned), GuardedState(tuple(runnable.written(returned)), state.step + 1, state.version)
