"""One stream of calls: its state, its history, and where it is."""

from __future__ import annotations

import dataclasses
import threading
import warnings
from typing import Any

from torch import Tensor

from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import CacheWarning, StateError
from bwcache_compile.report import ContextReport, RawStep, step_records
from bwcache_compile.runtime.clock import Clock
from bwcache_compile.runtime.programs import Fit
from bwcache_compile.runtime.signature import changed_numbers
from bwcache_compile.runtime.state import CacheState

UNNAMED = "default"
"""Name of the context of calls that are in none."""


@dataclasses.dataclass(frozen=True)
class Moment:
    """What the caller said about a call: the context's name, the step and the number of steps, where known.

    Contexts of one `group` may decide together (`CacheConfig.decide`). `named` is False where the caller opened no
    context, so that calls can only be told apart by their order.
    """

    name: str
    step_index: int | None = None
    num_steps: int | None = None
    named: bool = True
    group: str = ""


class Context:
    """Mutable holder of one context's state; only the thread that has `lock` touches it."""

    def __init__(self, name: str) -> None:
        """Start without a state."""
        self.name = name
        self.group = ""
        self.agreed_at = -1
        self.renumbered = False
        self.trigger: Tensor | None = None
        self.lock = threading.Lock()
        self.state: CacheState | None = None
        self.fit: Fit | None = None
        self.clock = Clock()
        self.records: list[RawStep] = []
        self.events: list[str] = []

    def start(self, *events: str) -> None:
        """Begin a new generation: the history of the last one goes."""
        self.records, self.events = [], list(events)
        self.agreed_at, self.trigger = -1, None

    def report(self) -> ContextReport:
        """Return the current generation as a value."""
        held = self.state.bytes if self.state else 0
        return ContextReport(self.name, step_records(self.records), tuple(self.events), held)

    def forget(self, why: str, step: int, fit: Fit) -> None:
        """Drop what is cached and keep the step."""
        self.events.append(f"{why} before step {step}: the cache was cleared")
        self.agreed_at, self.trigger = -1, None
        self.state = fit.loaded.fresh(fit.sizes, step)


def _starts_over(context: Context, moment: Moment, state: CacheState, flat: list[Any]) -> bool:
    """Whether the time says that a run began anew; asked only where the caller does not give the step.

    Raises:
        StateError: The calls of one step are not told apart.
    """
    if state.step == 1 and context.clock.same_moment(flat):
        if moment.named:
            return True
        raise StateError(
            "two calls in a row have the same timestep: the model is called more than once a step, and the calls would"
            " overwrite one another's cache. Wrap each in `with cached.cache_context(name):`, or set"
            " CacheConfig(calls_per_step=2). If the first call was of a run that was broken off, call cached.reset()."
        )
    return context.clock.went_back(flat)


def _check_values(state: CacheState, before: Fit, fit: Fit, num_steps: int | None) -> None:
    """Refuse values that are built into a program and change in the middle of a run.

    Raises:
        StateError: They did.
    """
    old = dict(before.key.values)
    names = [fit.loaded.program.signature.inputs[i] for i, value in fit.key.values if old.get(i, value) != value]
    if names and before.key._replace(values=()) == fit.key._replace(values=()) and 0 < state.step < (num_steps or 0):
        raise StateError(
            f"`{names[0]}` holds other values than at step {state.step - 1}, and the model reads such values in Python, which builds them"
            " into its graph; nothing could be kept from one step to the next.\n"
            f"    at {fit.loaded.program.signature.read_at}\n"
            "  Take that Python (a branch, .item(), .tolist()) out of the model's forward. If the run before was broken off, call"
            " cached.reset()."
        )


def _check_numbers(context: Context, changed: dict[int, tuple[Any, Any]], fit: Fit) -> None:
    """Refuse a Python number that changes at every call; one change may be another run's.

    Raises:
        StateError: It changed at the call before, too.
    """
    if context.renumbered and changed:
        at, (old, new) = next(iter(changed.items()))
        name = fit.loaded.program.signature.inputs[at]
        raise StateError(
            f"`{name}` is a Python number that changes from call to call ({old}, then {new}). A graph has such numbers built in, so"
            f" nothing could be kept from one step to the next. Pass it as a tensor, such as torch.tensor({new}). If each of these calls"
            " is a run of its own, call cached.reset() between them."
        )
    context.renumbered = bool(changed)


def arrive(context: Context, moment: Moment, fit: Fit, flat: list[Any], num_steps: int | None) -> CacheState:
    """Bring a context to the step of a call: a new generation, a lost cache, or simply the next step.

    A new generation begins, in this order of authority: where the caller's `step_index` goes back, where the count of
    calls has reached `num_steps`, where the inputs are of another signature, and where the time goes back.

    Args:
        context: Locked by the caller.
        moment: What the caller said about the call.
        fit: The program that the call needs, and the model's version.
        flat: The call's leaves.
        num_steps: Steps of a generation, where known; one more call begins the next.

    Returns:
        The state to run on; its `step` is the step of this call.

    Raises:
        StateError: The call is at the same moment as the one before it, its step index is out of range, a Python number
            in its inputs changes at every call, or values that the model reads in Python changed.
    """
    given, before = moment.step_index, context.fit
    if given is not None and num_steps is not None and not 0 <= given < num_steps:
        raise StateError(f"step_index {given} is outside the {num_steps} steps of a generation (0 .. {num_steps - 1}).")
    state = context.state
    _check_numbers(context, changed_numbers(before.key, fit.key) if before is not None and num_steps != 1 else {}, fit)
    if state is not None and before is not None:
        _check_values(state, before, fit, num_steps)
    step = given if given is not None else state.step if state else 0
    events = None
    if state is None or before is None or (num_steps is not None and step >= num_steps) or step < state.step:
        events = []
        if state is not None and given is not None and 0 < given == state.step - 1:
            events = [f"step {given} came again: a new generation began. Where a step takes several calls, give each a context of its own"]
    elif before.key != fit.key:
        events = [f"the inputs changed before step {state.step}: a new generation began"]
    elif given is None and _starts_over(context, moment, state, flat):
        events = [f"the time went back before step {state.step}: a new generation began"]
    if events is not None:
        context.start(*events)
        context.clock.start(flat)
        step = given or 0
        context.state = fit.loaded.fresh(fit.sizes, step)
    elif before is not None and before.version != fit.version:
        rebuilt = before.version[0] != fit.version[0]
        context.forget(f"the modules changed ({fit.changed})" if rebuilt else "the weights changed", step, fit)
    context.fit = fit
    assert context.state is not None
    return dataclasses.replace(context.state, step=step)


def warn_without_reuse(context: Context, config: CacheConfig) -> None:
    """At the end of a generation that reused nothing: say so, and which threshold would have."""
    if config.policy != "schedule" or config.threshold == 0:
        return
    report = context.report()
    if report.reused or any(report.reused_by_block):
        return
    if len(report.steps) < 3:  # an expert that joined at the end: too short a stretch for any threshold
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
