"""Letting the contexts of one step decide together: guidance amplifies the difference of their errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import StateError
from bwcache_compile.runtime.context import Context


def _trigger(context: Context) -> int:
    """Return the position of the trigger among a context's slots."""
    assert context.fit is not None
    return next(i for i, slot in enumerate(context.fit.loaded.plan.slots) if slot.role == "trigger")


def _change(context: Context) -> Tensor | None:
    """Return what a context measured at its last computed step; None for a policy that measures nothing."""
    return next((record.change for record in reversed(context.records) if record.computed), None)


def agree(context: Context, contexts: Iterable[Context], config: CacheConfig, num_steps: int | None) -> None:
    """Give all contexts that computed the last step one trigger and one number of steps to reuse.

    Called when the first context arrives at the next step, so all of them have measured. The graph's own policy runs
    once more, on the changes of all their blocks together: its indicator is the mean over all. A context that skipped
    the step, or joined late, decides with those that compute the same steps as it does.

    Args:
        context: The one that arrives; locked by the caller.
        contexts: All of the model's.
        config: Policy settings.
        num_steps: Steps of a generation.

    Raises:
        StateError: Another thread is inside one of the contexts that decide with this one.
    """
    state = context.state
    if state is None or context.fit is None or state.computed_at != state.step - 1 or context.agreed_at == state.computed_at:
        return
    if _change(context) is None:
        return
    members = [context]
    for other in contexts:
        if other is not context and other.group == context.group and other.state and other.state.computed_at == state.computed_at:
            if other.lock.locked():
                raise StateError(
                    f"the contexts {context.name!r} and {other.name!r} decide together, and another thread is inside the second."
                    " Call the contexts of a step one after another, or give each video a group of its own:"
                    " `with cached.cache_context(name, group=...):`."
                )
            members.append(other)
    changes = [_change(member) for member in members]
    loaded = context.fit.loaded
    step = loaded.step_tensor(state.computed_at)
    # what each graph decided on its own is dropped: the trigger goes on from the last common decision
    triggers = [torch.full_like(step, -1), *(member.trigger for member in members if member.trigger is not None)]
    with torch.no_grad():
        change = torch.cat([c.to(step.device) for c in changes if c is not None])
        trigger = torch.stack(triggers).amax(dim=0)  # equal, unless one joined late or lost its cache
        trigger, left = loaded.decide(change, trigger, step, *loaded.parameters(config, num_steps))
    for member in members:
        assert member.state is not None
        at, slots = _trigger(member), member.state.slots
        member.state = dataclasses.replace(
            member.state, slots=(*slots[:at], trigger, *slots[at + 1 :]), reuse_until=state.computed_at + int(left)
        )
        member.agreed_at, member.trigger = state.computed_at, trigger
