"""What one context keeps between steps of an opaque model, and how a step makes the next one's. Values: nothing is written to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bwcache_compile.config import CacheConfig
from bwcache_compile.ir.policy_tensors import host_decision, policy_parameters
from bwcache_compile.ir.ranks import Ranks, mean_over_ranks
from bwcache_compile.opaque.guards import BlockCall, CallPlace
from bwcache_compile.policies import INDICATORS, POLICIES
from bwcache_compile.policies.definitions import SmallSlot, takes
from bwcache_compile.stepping import Cursor

Slots = Mapping[str, Tensor]
"""Kept tensors by the name of their slot."""


@dataclasses.dataclass(frozen=True)
class OpaqueState:
    """Everything that one context carries from step to step.

    Attributes:
        cursor: The next step, and which steps reuse.
        calls: The calls at the last computed step that a reused step returns something for: the blocks', or the model's own.
        kept: For each call, for each leaf of its output: the slots of the way of reusing; None where the leaf is held as it is.
        shared: The slots that all outputs share.
        references: Measured features of the last computed step, in the order of what the indicator returns.
        policy: The policy's own slots.
    """

    cursor: Cursor = dataclasses.field(default_factory=Cursor)
    calls: Mapping[CallPlace, BlockCall] = dataclasses.field(default_factory=dict)
    kept: Mapping[CallPlace, tuple[Slots | None, ...]] = dataclasses.field(default_factory=dict)
    shared: Slots = dataclasses.field(default_factory=dict)
    references: Mapping[CallPlace, Tensor] = dataclasses.field(default_factory=dict)
    policy: Slots = dataclasses.field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Bytes of the memory that its tensors take."""
        tensors = [leaf for call in self.calls.values() for leaf in call.outputs if isinstance(leaf, Tensor)]
        tensors += [tensor for leaves in self.kept.values() for slots in leaves if slots is not None for tensor in slots.values()]
        tensors += [*self.shared.values(), *self.references.values(), *self.policy.values()]
        return sum({s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}.values())


@dataclasses.dataclass(frozen=True)
class Moment:
    """Where a step is.

    Attributes:
        time: float32[1]: the time, or the index where no input tells it.
        step: int64[1], its index.
        num_steps: Steps of the generation, if known.
    """

    time: Tensor
    step: Tensor
    num_steps: int | None

    @property
    def operands(self) -> dict[str, Tensor]:
        """What ways of reusing take of it."""
        return {"time": self.time, "step": self.step}


def _fresh(slots: tuple[SmallSlot, ...], device: torch.device) -> dict[str, Tensor]:
    return {slot.name: torch.full(slot.shape, slot.fill, dtype=getattr(torch, slot.dtype), device=device) for slot in slots}


def _kept(slots: Slots) -> dict[str, Tensor]:
    return {f"kept_{name}": tensor for name, tensor in slots.items()}


def _call(function: Callable[..., Any], operands: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """Call a function of a policy or of a way of reusing on what it takes; return its results."""
    returned = function(*(operands[name] for name in takes(function)))
    return tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)


def _keep(config: CacheConfig, output: Any, before: Slots | None, moment: Moment) -> Slots | None:
    """Return the next slots of one leaf of a block's output."""
    way = config.graph_settings.way
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return None  # held: there is no sum of whole numbers
    if before is None or next(iter(before.values())).shape != output.shape:
        before = dict.fromkeys(way.slots, output.new_zeros(()).expand_as(output))
    operands = {"output": output, **_kept(before), **moment.operands}
    return dict(zip(way.slots, _call(way.keep, operands), strict=True))


class ReusedOutputs:
    """What a reused step returns for each call that is kept. It shares no memory with what is kept."""

    def __init__(self, config: CacheConfig, state: OpaqueState, moment: Moment) -> None:
        """Take what is the same for all calls of the step."""
        self._way, self._state = config.graph_settings.way, state
        names = [parameter.name for parameter in self._way.parameters]
        parameters = dict(zip(names, policy_parameters(config, moment.num_steps, moment.step.device, names), strict=True))
        self._shared = {**_kept(state.shared), **parameters, **moment.operands}

    def __call__(self, place: CallPlace) -> tuple[Any, ...]:
        """Return the leaves for one call."""
        leaves: list[Any] = []
        for held, slots in zip(self._state.calls[place].outputs, self._state.kept[place], strict=True):
            leaf = held
            if slots is not None:
                (leaf,) = _call(self._way.reuse, {**_kept(slots), **self._shared})
            leaves.append(leaf.clone() if isinstance(leaf, Tensor) else leaf)
        return tuple(leaves)


def decide(config: CacheConfig, slots: Slots, change: Tensor | None, step: Tensor, num_steps: int | None) -> tuple[Slots, int]:
    """Ask the policy after a computed step: what it keeps, and how many of the following steps reuse. Reads one number from the device.

    Args:
        config: The settings.
        slots: What the policy kept at the computed step before; empty at the first one.
        change: float32[blocks], what the indicator measured; None for a policy that measures nothing.
        step: int64[1], the step just computed.
        num_steps: Steps of the generation, if known.

    Raises:
        ConfigError: The policy needs the number of steps, and it is not known.
    """
    policy = POLICIES[config.policy]
    named = {"step": step, **(slots or _fresh(policy.slots, step.device))}
    if change is not None:
        named["change"] = change
    names = [parameter.name for parameter in policy.parameters]
    named |= dict(zip(names, policy_parameters(config, num_steps, step.device, names), strict=True))
    *after, left = _call(policy.decide, named)
    return dict(zip((slot.name for slot in policy.slots), after, strict=True)), int(left)


def computed_state(
    config: CacheConfig,
    state: OpaqueState,
    calls: Mapping[CallPlace, BlockCall],
    features: Mapping[CallPlace, Tensor],
    moment: Moment,
    ranks: Ranks | None = None,
) -> tuple[OpaqueState, Tensor | None]:
    """Return the state after a computed step, and what the indicator measured, float32[blocks].

    Args:
        config: The settings.
        state: The state before the step.
        calls: What is kept: the calls of the blocks, or the model's own.
        features: What is measured of the blocks' outputs, by call.
        moment: Where the step is.
        ranks: Those over which the indicator is measured; None measures on this one.

    Raises:
        ConfigError: The policy needs the number of steps, and it is not known.
    """
    way = config.graph_settings.way
    kept = {}
    for place, call in calls.items():
        before = state.kept.get(place, ())
        kept[place] = tuple(
            _keep(config, output, before[leaf] if leaf < len(before) else None, moment) for leaf, output in enumerate(call.outputs)
        )
    shared: Slots = state.shared or _fresh(way.shared, moment.step.device)
    if way.keep_shared is not None:
        shared = dict(zip(shared, _call(way.keep_shared, {**_kept(shared), **moment.operands}), strict=True))
    change = None
    if features:
        references = [state.references.get(place, torch.zeros_like(feature)) for place, feature in features.items()]
        alike = zip(references, features.values(), strict=True)
        references = [old if old.shape == new.shape else torch.zeros_like(new) for old, new in alike]
        change = INDICATORS[config.indicator](list(features.values()), references)
        change = change if ranks is None else mean_over_ranks(change, references, ranks)
    policy, left = state.policy, host_decision(config, moment.num_steps, state.cursor.step)
    if left is None:
        policy, left = decide(config, state.policy, change, moment.step, moment.num_steps)
    return OpaqueState(state.cursor.computed(left), dict(calls), kept, shared, dict(features), policy), change
