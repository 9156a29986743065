"""Make one decision for all contexts of a step: guidance amplifies the difference of their errors."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import StateError
from bwcache_compile.policies import POLICIES
from bwcache_compile.runtime.context import ModelContext


def _change(context: ModelContext) -> Tensor | None:
    """Return what a context measured at its last computed step; None for a policy that measures nothing."""
    return next((record.change for record in reversed(context.records) if record.computed), None)


def _decides_with(other: ModelContext, context: ModelContext) -> bool:
    """Whether another context computed the last step of the same run: it was called since this one's last call."""
    if other is context or other.group != context.group or other.called < context.called:
        return False
    if other.tracker.run != context.tracker.run or other.state is None or other.match is None or context.state is None:
        return False
    return other.state.cursor.computed_at == context.state.cursor.computed_at


def synchronize_decisions(context: ModelContext, contexts: Iterable[ModelContext], config: CacheConfig, num_steps: int | None) -> None:
    """Give all contexts that computed the last step one decision: one number of steps to reuse, and what the policy keeps of it.

    Called when the first context begins the next step of its generation, so all of them have measured. The graph's
    own policy runs once more, on the changes of all their blocks together: its indicator is the mean over all. A context
    that skipped the step, or joined late, decides with those that compute the same steps as it does. One that was not
    called since this one's last call takes no part: its run has ended.

    Args:
        context: The one that begins its next step; locked by the caller.
        contexts: All of the model's.
        config: Policy settings.
        num_steps: Steps of a generation.

    Raises:
        StateError: Another thread is inside one of the contexts that decide with this one.
    """
    if context.state is None or context.match is None or _change(context) is None:
        return
    computed_at = context.state.cursor.computed_at
    if computed_at != context.state.step - 1 or context.agreed_at == computed_at:
        return
    with contextlib.ExitStack() as locks:
        members = [context]
        for other in contexts:
            if not _decides_with(other, context):
                continue
            if not other.lock.acquire(blocking=False):
                raise StateError(
                    f"contexts {context.name!r} and {other.name!r} share their decisions (decide='joint'), and another thread"
                    " is running the second."
                    " Call the contexts of a step one after another, or give each video a group of its own:"
                    " `with cached.cache_context(name, group=...):`."
                )
            locks.callback(other.lock.release)
            if _decides_with(other, context):  # nothing happened before the lock was held
                members.append(other)
        _decide(members, config, num_steps)


def _decide(members: list[ModelContext], config: CacheConfig, num_steps: int | None) -> None:
    first = members[0]
    assert first.match is not None
    assert first.state is not None
    computed_at, runnable = first.state.cursor.computed_at, first.match.runnable
    step, names = runnable.step_tensor(computed_at), [slot.name for slot in POLICIES[config.policy].slots]
    fresh = tuple(slot.fresh({}, step.device) for name in names for slot in runnable.plan.slots if slot.role == name)
    # what each graph decided on its own is dropped: the policy goes on from the last common decision
    kept = next((member.decided for member in members if member.decided is not None), fresh)
    changes = [_change(member) for member in members]
    with torch.no_grad():
        change = torch.cat([c.to(step.device) for c in changes if c is not None])
        kept, left = runnable.decide(change, kept, step, *runnable.parameters(config, num_steps, "compute"))
    reuse_until = computed_at + int(left)
    for member in members:
        assert member.state is not None
        assert member.match is not None
        roles = [slot.role for slot in member.match.runnable.plan.slots]
        slots = tuple(kept[names.index(r)] if r in names else slot for r, slot in zip(roles, member.state.slots, strict=True))
        cursor = dataclasses.replace(member.state.cursor, reuse_until=reuse_until)
        member.state = dataclasses.replace(member.state, slots=slots, cursor=cursor)
        member.agreed_at, member.decided = computed_at, kept
