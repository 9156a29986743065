"""What one call of an opaque model is, before the model runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from bwcache_compile.config import CacheConfig
from bwcache_compile.opaque.cache import Moment, OpaqueState, decide
from bwcache_compile.runtime.context import JointContext, what_changed
from bwcache_compile.stepping import Advance, Cursor, StepInfo, cache_cleared


class OpaqueContext(JointContext):
    """One stream of calls.

    Attributes:
        state: The cache, while a generation runs.
        version: Structure and weights of the model at the last call.
    """

    def __init__(self, info: StepInfo, created: int) -> None:
        """Start before the first call."""
        super().__init__(info, created)
        self.state: OpaqueState | None = None
        self.version = (-1, -1)

    @property
    def cursor(self) -> Cursor | None:
        """The next step, and which steps reuse; None where nothing is cached."""
        return None if self.state is None else self.state.cursor

    def decide(
        self, change: Tensor, kept: Mapping[str, Tensor], config: CacheConfig, num_steps: int | None
    ) -> tuple[Mapping[str, Tensor], int]:
        """Ask the policy once more; see `JointContext.decide`."""
        assert self.state is not None
        return decide(config, kept, change, torch.tensor([self.state.cursor.computed_at], device=change.device), num_steps)

    def follow_decision(self, kept: Mapping[str, Tensor], cursor: Cursor) -> None:
        """Take what was decided together in the place of the own decision."""
        assert self.state is not None
        self.state = dataclasses.replace(self.state, policy=kept, cursor=cursor)

    def release(self) -> None:
        """Drop the cache and what was decided together; the step is kept."""
        super().release()
        self.state = None


@dataclasses.dataclass(frozen=True)
class OpaqueStep:
    """One call: what it is, and what it runs on.

    Attributes:
        config: The settings when it began.
        advance: Which step of which generation it is.
        state: What it runs on.
        moment: Where in the generation it is.
        version: Structure and weights of the model.
        events: What a report says of it.
    """

    config: CacheConfig
    advance: Advance
    state: OpaqueState
    moment: Moment
    version: tuple[int, int]
    events: list[str]

    def afresh(self, why: str) -> OpaqueStep:
        """Return the same step on an empty cache."""
        return dataclasses.replace(self, state=OpaqueState(Cursor(self.advance.step)), events=[*self.events, why])


def numbers_as_tensors(flat: list[Any]) -> list[Any]:
    """Return the inputs of a call with Python numbers as tensors: one of them may be the time."""
    return [torch.tensor(leaf) if type(leaf) in (int, float) else leaf for leaf in flat]


def signature_of(flat: list[Any], spec: Any) -> Hashable:
    """Return what the inputs of one generation have in common: structure, and shape, dtype and device of each tensor.

    Numbers are left out, since they may be the time; so is the float dtype of tensors that may be.
    """

    def kind(leaf: Any) -> Hashable:
        if isinstance(leaf, Tensor):
            dtype = "floating" if leaf.dim() <= 2 and leaf.is_floating_point() else leaf.dtype
            return tuple(leaf.shape), dtype, leaf.device
        if isinstance(leaf, (str, bool)):
            return leaf
        return type(leaf).__qualname__

    return str(spec), tuple(map(kind, flat))


def moment_of(flat: list[Any], step: int, num_steps: int | None) -> Moment:
    """Return where a step is: the time is the one float32 input of rank 0 or 1, or the one column [B, 1], else the index."""
    tensors = [leaf for leaf in flat if isinstance(leaf, Tensor)]
    device = max(tensors, key=Tensor.numel).device if tensors else torch.device("cpu")
    index = torch.full((1,), step, dtype=torch.int64, device=device)  # filled there: a copy from the host would wait for the device
    columns = [leaf for leaf in tensors if leaf.dim() == 2 and leaf.shape[1] == 1]
    short = [leaf for leaf in tensors if leaf.dim() <= 1] or columns
    told = len(short) == 1 and short[0].dtype == torch.float32 and short[0].numel() > 0
    return Moment(short[0].reshape(-1)[:1].to(device) if told else index.float(), index, num_steps)


def state_for(context: OpaqueContext, advance: Advance, version: tuple[int, int], changed: str) -> tuple[OpaqueState, list[str]]:
    """Return the state that a call runs on, and what a report says of it.

    The cache is used only if the same model made it in the same generation.
    """
    events = [advance.event] if advance.event else []
    fresh = OpaqueState(Cursor(advance.step))
    if advance.began or context.state is None:
        return fresh, events
    if context.version != version:
        return fresh, [*events, cache_cleared(what_changed(context.version, version, changed), advance.step)]
    if advance.cleared:
        return fresh, events
    return dataclasses.replace(context.state, cursor=context.state.cursor.at(advance.step)), events
