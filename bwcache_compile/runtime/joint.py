"""Make one decision for all contexts and stacks of a step: guidance amplifies the difference of the contexts' errors."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable

import torch

from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import StateError
from bwcache_compile.runtime.context import JointContext


def _decides_with(other: JointContext, context: JointContext) -> bool:
    """Whether another context computed the last step of the same run: it was called since this one's last call."""
    if other is context or other.group != context.group or other.called < context.called:
        return False
    mine, theirs = context.cursor, other.cursor
    if other.tracker.run != context.tracker.run or mine is None or theirs is None:
        return False
    return theirs.computed_at == mine.computed_at


def synchronize_decisions(context: JointContext, contexts: Iterable[JointContext], config: CacheConfig, num_steps: int | None) -> None:
    """Give all contexts that computed the last step one decision: one number of steps to reuse, and what the policy keeps of it.

    Called when the first context begins the next step of its generation, so all of them have measured. The context's
    own policy runs once more, on the changes of all their blocks together: its indicator is the mean over all. A context
    that skipped the step, or joined late, decides with those that compute the same steps as it does. One that was not
    called since this one's last call takes no part: its run has ended.

    Args:
        context: The one that begins its next step; locked by the caller.
        contexts: All of the model's; where its stacks of blocks are cached apart, those of all stacks.
        config: Policy settings.
        num_steps: Steps of a generation.

    Raises:
        StateError: Another thread is inside one of the contexts that decide with this one.
    """
    cursor = context.cursor
    if cursor is None or context.change is None:
        return
    if cursor.computed_at != cursor.step - 1 or context.agreed_at == cursor.computed_at:
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


def _decide(members: list[JointContext], config: CacheConfig, num_steps: int | None) -> None:
    # what each decided on its own is dropped: the policy goes on from the last common decision
    kept = next((member.decided for member in members if member.decided), {})
    changes = [member.change for member in members]
    with torch.no_grad():
        given = [change for change in changes if change is not None]
        decided, left = members[0].decide(torch.cat([change.to(given[0].device) for change in given]), kept, config, num_steps)
    for member in members:
        cursor = member.cursor
        assert cursor is not None
        member.follow_decision(decided, dataclasses.replace(cursor, reuse_until=cursor.computed_at + left))
        member.agreed_at, member.decided = cursor.computed_at, decided
