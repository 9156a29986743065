"""One stream of calls: its state, its history, and where it is."""

from __future__ import annotations

import dataclasses
import threading
import warnings
from typing import Any

from torch import Tensor

from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import CacheWarning, StateError
from bwcache_compile.runtime.loaded import LoadedProgram
from bwcache_compile.runtime.report import ContextReport, StepRecord
from bwcache_compile.runtime.signature import same_moment
from bwcache_compile.runtime.state import CacheState, fresh_state

UNNAMED = "default"
"""Name of the context of calls that are in none."""


@dataclasses.dataclass(frozen=True)
class Moment:
    """What the caller said about a call: the context's name, the step and the number of steps, where known."""

    name: str
    step_index: int | None = None
    num_steps: int | None = None


class Context:
    """Mutable holder of one context's state; only the thread that has `lock` touches it."""

    def __init__(self, name: str) -> None:
        """Start without a state."""
        self.name = name
        self.lock = threading.Lock()
        self.state: CacheState | None = None
        self.owner: LoadedProgram | None = None
        self.weights: int | None = None
        self.inputs: list[Any] = []
        self.records: list[StepRecord] = []
        self.events: list[str] = []

    def start(self) -> None:
        """Begin a new generation: the history of the last one goes."""
        self.records, self.events, self.weights = [], [], None

    def report(self) -> ContextReport:
        """Return the current generation as a value."""
        held = self.state.bytes if self.state else 0
        return ContextReport(self.name, tuple(self.records), tuple(self.events), held)


def arrive(context: Context, moment: Moment, loaded: LoadedProgram, flat: list[Any], num_steps: int | None, weights: int) -> CacheState:
    """Bring a context to the step of a call: a new generation, a lost cache, or simply the next step.

    Args:
        context: Locked by the caller.
        moment: What the caller said about the call.
        loaded: The program that the call needs.
        flat: The call's leaves.
        num_steps: Steps of a generation, where known; one more call begins the next.
        weights: Version of the weights.

    Returns:
        The state to run on; its `step` is the step of this call.

    Raises:
        StateError: The call is at the same moment as the one before it, or its step index is out of range.
    """
    state = context.state
    if moment.step_index is not None and num_steps is not None and not 0 <= moment.step_index < num_steps:
        raise StateError(f"step_index {moment.step_index} is outside the {num_steps} steps of a generation (0 .. {num_steps - 1}).")
    step = moment.step_index if moment.step_index is not None else state.step if state else 0
    first = 0 if moment.step_index is None else step
    if state is None or (num_steps is not None and step >= num_steps) or step < state.step:
        context.start()
        step, state = first, fresh_state(loaded.plan, first)
    elif context.owner is not loaded:
        context.start()
        context.events.append(f"the inputs or modules changed before step {state.step}: a new generation began")
        step, state = first, fresh_state(loaded.plan, first)
    if context.weights not in (None, weights):
        context.events.append(f"the weights changed before step {step}: the cache was cleared")
        state = fresh_state(loaded.plan, step)
    if moment.name == UNNAMED and moment.step_index is None and step == 1 and same_moment(context.inputs, flat):
        raise StateError(
            "two calls in a row have the same timestep: the model is called more than once a step, and the calls would"
            " overwrite one another's cache. Wrap each in `with cached.cache_context(name):`, or set"
            " CacheConfig(calls_per_step=2)."
        )
    # a copy, because a pipeline may write the next timestep into the same tensor
    context.inputs = [leaf.clone() if isinstance(leaf, Tensor) and leaf.dim() <= 2 else leaf for leaf in flat] if step == 0 else []
    context.owner, context.weights = loaded, weights
    return dataclasses.replace(state, step=step)


def warn_without_reuse(context: Context, config: CacheConfig) -> None:
    """At the end of a generation that reused nothing: say so, and which threshold would have."""
    report = context.report()
    if report.reused or config.policy != "schedule" or config.threshold == 0:
        return
    best = report.smallest(max(1, config.warmup_steps))
    advice = (
        f"the smallest indicator was {best.indicator:.4g} at step {best.step}; a threshold above it would have triggered there."
        if best is not None
        else "no finite indicator was measured."
    )
    text = f"no step of context {context.name!r} was reused at threshold {config.threshold:g}: {advice}"
    context.events.append(text)
    warnings.warn(text, CacheWarning, stacklevel=4)
