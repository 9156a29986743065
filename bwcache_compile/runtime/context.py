"""A context of a cached model: its cache, and what must hold for the cache to be used."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

from torch import Tensor

from bwcache_compile.clock import HALF, TimeInput, may_be_time
from bwcache_compile.config import CacheConfig
from bwcache_compile.context import Context
from bwcache_compile.errors import StateError, warn
from bwcache_compile.policies import POLICIES
from bwcache_compile.runtime.match import ProgramMatch
from bwcache_compile.runtime.signature import CallKey
from bwcache_compile.runtime.state import CacheState
from bwcache_compile.size_expressions import evaluated
from bwcache_compile.stepping import Advance, Cursor, StepInfo, cache_cleared


class JointContext(Context):
    """One stream of calls whose decisions may be those of several.

    Attributes:
        agreed_at: The last computed step after which contexts decided together.
        decided: What the policy kept of their decision, by the name of its slot; empty where they have not decided.
    """

    def __init__(self, info: StepInfo, created: int) -> None:
        """Start before the first call."""
        super().__init__(info, created)
        self.agreed_at = -1
        self.decided: Mapping[str, Tensor] = {}

    @property
    def cursor(self) -> Cursor | None:
        """The next step, and which steps reuse; None where nothing is cached."""
        raise NotImplementedError

    @property
    def change(self) -> Tensor | None:
        """What was measured at the last computed step; None for a policy that measures nothing."""
        return next((record.change for record in reversed(self.records) if record.computed), None)

    def decide(
        self, change: Tensor, kept: Mapping[str, Tensor], config: CacheConfig, num_steps: int | None
    ) -> tuple[Mapping[str, Tensor], int]:
        """Ask the policy once more after the last computed step.

        Args:
            change: float32[blocks], what was measured in all contexts that decide together.
            kept: What the policy kept of the decision before; empty where there was none.
            config: The settings.
            num_steps: Steps of the generation, if known.

        Returns:
            What the policy keeps, and how many of the following steps reuse.
        """
        raise NotImplementedError

    def follow_decision(self, kept: Mapping[str, Tensor], cursor: Cursor) -> None:
        """Take what was decided together in the place of the own decision."""
        raise NotImplementedError

    def release(self) -> None:
        """Drop the cache and what was decided together; the step is kept."""
        self.decided, self.agreed_at = {}, -1


class ModelContext(JointContext):
    """One stream of calls of a cached model.

    Attributes:
        state: The cache, while a generation runs.
        match: What the last call ran with, while a generation runs.
        key: What the last call looked like.
        version: Structure and weights of the model at the last call.
        layout: What the cache consists of, where the context is a sample of a batch.
        renumbered: Whether a Python number changed at the last call.
    """

    def __init__(self, info: StepInfo, created: int) -> None:
        """Start before the first call."""
        super().__init__(info, created)
        self.state: CacheState | None = None
        self.match: ProgramMatch | None = None
        self.key: CallKey | None = None
        self.layout: Hashable = None
        self.version = (-1, -1)
        self.renumbered = False

    @property
    def cursor(self) -> Cursor | None:
        """The next step, and which steps reuse; None where nothing is cached."""
        return None if self.state is None or self.match is None else self.state.cursor

    def decide(
        self, change: Tensor, kept: Mapping[str, Tensor], config: CacheConfig, num_steps: int | None
    ) -> tuple[Mapping[str, Tensor], int]:
        """Run the graph's own policy once more; see `JointContext.decide`."""
        assert self.state is not None
        assert self.match is not None
        runnable = self.match.runnable
        step, names = runnable.step_tensor(self.state.cursor.computed_at), [slot.name for slot in POLICIES[config.policy].slots]
        slots = kept or {slot.role: slot.fresh({}, step.device) for slot in runnable.plan.slots if slot.role in names}
        parameters = runnable.parameters(config, num_steps, "compute")
        after, left = runnable.decide(change.to(step.device), [slots[name] for name in names], step, *parameters)
        return dict(zip(names, after, strict=True)), int(left)

    def follow_decision(self, kept: Mapping[str, Tensor], cursor: Cursor) -> None:
        """Take what was decided together in the place of the own decision."""
        assert self.state is not None
        assert self.match is not None
        roles = [slot.role for slot in self.match.runnable.plan.slots]
        slots = tuple(kept.get(role, slot) for role, slot in zip(roles, self.state.slots, strict=True))
        self.state = dataclasses.replace(self.state, slots=slots, cursor=cursor)

    def release(self) -> None:
        """Drop the cache, the program and what was decided together; the step is kept."""
        super().release()
        self.state = self.match = None


def time_inputs(flat: list[Any]) -> Mapping[Hashable, TimeInput]:
    """Return the inputs of a call that may be the time: short real tensors of rank 2 or less, by position."""

    def input_of(leaf: Tensor, dtype: str) -> TimeInput:
        return TimeInput(leaf.dim(), dtype in HALF, lambda: leaf.detach().reshape(-1).tolist())

    named = ((i, leaf, str(leaf.dtype).removeprefix("torch.")) for i, leaf in enumerate(flat) if isinstance(leaf, Tensor))
    return {i: input_of(leaf, dtype) for i, leaf, dtype in named if may_be_time(leaf.shape, dtype)}


def check_values(context: ModelContext, match: ProgramMatch, num_steps: int | None) -> None:
    """Refuse values that are built into a program and change in the middle of a run.

    Raises:
        StateError: Such a value changed.
    """
    if context.key is None or context.state is None:
        return
    old, step = dict(context.key.values), context.tracker.next_step
    names = [match.runnable.program.signature.inputs[i] for i, value in match.key.values if old.get(i, value) != value]
    if names and context.key._replace(values=()) == match.key._replace(values=()) and 0 < step < (num_steps or 0):
        raise StateError(
            f"the values of `{names[0]}` changed after step {step - 1}. The model reads them in Python, so they are constants"
            " of the captured graph, and nothing can be reused.\n"
            f"    at {match.runnable.program.signature.read_at}\n"
            "  Remove that Python (a branch, .item(), .tolist()) from the model's forward. If the previous run was interrupted, call"
            " cached.reset()."
        )


def _interchangeable(one: ProgramMatch, other: ProgramMatch) -> bool:
    """Whether the cache of one program is valid for another, such as one for another dtype of the time or for dynamic sizes."""
    if one.runnable is other.runnable:
        return True
    kept = []
    for match in (one, other):
        plan, sizes = match.runnable.plan, match.sizes
        slots = [(slot.name, slot.role, slot.dtype, slot.order, evaluated(slot.shape, sizes)) for slot in match.runnable.slots]
        kept.append(([block.name for block in plan.blocks], plan.time_input, slots))  # nodes are named by each graph
    return kept[0] == kept[1]


def what_changed(before: tuple[int, int], now: tuple[int, int], moved: str) -> str:
    """Say what of a model changed between two of its versions, structure and weights; `moved` is what moved the structure last."""
    return f"the modules changed ({moved})" if before[0] != now[0] else "the weights changed"


def state_for(context: ModelContext, advance: Advance, match: ProgramMatch) -> tuple[CacheState, list[str]]:
    """Return the state that a call runs on, and what a report says of it.

    The cache is used only if the same model made it in the same generation.
    """
    step, events = advance.step, [advance.event] if advance.event else []
    if advance.began:
        return match.runnable.fresh(match.sizes, step), events
    why = ""
    if context.version != match.version:
        why = what_changed(context.version, match.version, match.changed)
    elif context.state is None or context.match is None:
        why = "the generation had ended"
    elif not _interchangeable(context.match, match):
        why = "the program changed"
    if why:
        events.append(cache_cleared(why, step))
    if why or advance.cleared or context.state is None:
        return match.runnable.fresh(match.sizes, step), events
    return context.state.at(step), events


def warn_without_reuse(context: Context, config: CacheConfig) -> None:
    """Warn at the end of a generation that reused nothing, and name a threshold that would have."""
    explain = POLICIES[config.policy].no_reuse
    if explain is None:
        return
    report = context.report(config)
    if report.reused or any(report.reused_by_block):
        return
    if len(report.steps) < 3:  # such as an expert that runs the last steps only: too few steps for any threshold
        return
    why = explain(config, report.smallest(max(1, config.warmup_steps)))
    if why is None:
        return
    text = f"no step of context {context.name!r} was reused {why}"
    context.events.append(text)
    warn(text)
