"""What a policy and a way of reusing consist of. Needs no torch: tensor arithmetic imports it where it runs.

The functions are traced into the graphs, so torch, ONNX Runtime and TensorRT decide alike. Their parameters are named
after what they take. They must not branch on values, and scalars are tensors of shape [1].
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from bwcache_compile.errors import ConfigError

if TYPE_CHECKING:
    from bwcache_compile.config import CacheConfig
    from bwcache_compile.report import StepRecord

Dtype = Literal["float32", "int64"]
Values = tuple[float | int, ...] | tuple[tuple[float | int, ...], ...]
"""What a parameter holds: numbers, or rows of them."""


def takes(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of a function's parameters, in order."""
    return tuple(inspect.signature(function).parameters)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A value that the graphs take as an input `policy_<name>`, so that changing it recompiles nothing.

    Its shape is [1], or with `per_step` one entry for each step of `CacheConfig.steps_mask`; with `columns` each entry is a row.
    """

    name: str
    dtype: Dtype = "int64"
    per_step: bool = False
    columns: int = 0


@dataclasses.dataclass(frozen=True)
class SmallSlot:
    """A small tensor of the cache state. It holds `fill` before the first step."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    fill: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """When a step reuses: after each computed step, `decide` says how many of the following steps reuse.

    Attributes:
        decide: Takes tensors by these names: `step` (int64[1], the step just computed), `change` (float32[blocks], what
            the indicator measured), the slots and the parameters. Returns the slots' next values in order, then int64[1], how
            many of the following steps reuse. Blocks are measured if it takes `change`. At step 0 `change` is
            infinite or NaN, which must count as "changed".
        values: From the settings and the number of steps (None where it is not known) to the parameters' values, in
            order. Raises ConfigError where the policy needs what is not known.
        parameters: The values that the graphs take as inputs.
        slots: What the policy itself keeps from one computed step to the next.
        at_threshold: The settings with a threshold and without anything that delays reuse, for a number of steps. The check of
            an export runs them to reach computed and reused steps; without it the settings themselves are run.
        no_reuse: Why a generation reused nothing, from the settings and the computed step with the smallest indicator; None
            where that was asked for.
        explain: What a report says of a generation besides its steps, from the settings and the steps.
    """

    decide: Callable[..., Any]
    values: Callable[[CacheConfig, int | None], dict[str, Values]]
    parameters: tuple[Parameter, ...]
    slots: tuple[SmallSlot, ...] = ()
    at_threshold: Callable[[CacheConfig, float, int], CacheConfig] | None = None
    no_reuse: Callable[[CacheConfig, StepRecord | None], str | None] | None = None
    explain: Callable[[CacheConfig, Sequence[StepRecord]], tuple[str, ...]] | None = None

    @property
    def measures(self) -> bool:
        """Whether blocks are measured."""
        return "change" in takes(self.decide)

    @property
    def reads_mask(self) -> bool:
        """Whether the policy reads `CacheConfig.steps_mask`."""
        return any(parameter.per_step for parameter in self.parameters)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reuse:
    """What a computed step keeps, and what a reused step returns in place of each output of the cached blocks.

    Attributes:
        keep: Called for each output. Takes tensors by these names: `output` (what the blocks returned), `source` (the input of
            the blocks that the output continues: input plus what the blocks added), `kept_<slot>` (what a slot holds from the
            computed step before), `time` (float32[1]), `step` (int64[1]). Returns the slots' next values in order.
        reuse: Called for each output. Takes `source`, `kept_<slot>` for every slot, the parameters, `time` and `step`. Returns the
            output.
        slots: Names of what is kept for each output; each has the output's shape and dtype.
        shared: What is kept once for all outputs.
        keep_shared: Takes `kept_<slot>` of the shared slots, `time` and `step`. Returns the shared slots' next values in order.
        parameters: The values that the graph of a reused step takes as inputs.
        values: From the settings to the parameters' values, in order.
        any_dtype: Whether outputs of whole numbers can be reused too.
        anchors: How many computed steps it keeps.
        with_anchors: The same with another number of anchors, where that is a choice.
    """

    keep: Callable[..., Any]
    reuse: Callable[..., Any]
    slots: tuple[str, ...] = ("output",)
    shared: tuple[SmallSlot, ...] = ()
    keep_shared: Callable[..., Any] | None = None
    parameters: tuple[Parameter, ...] = ()
    values: Callable[[CacheConfig], dict[str, Values]] | None = None
    any_dtype: bool = False
    anchors: int = 1
    with_anchors: Callable[[int], Reuse] | None = None

    @property
    def slot_names(self) -> tuple[str, ...]:
        """Names of all slots."""
        return (*self.slots, *(slot.name for slot in self.shared))

    @property
    def adds_to_input(self) -> bool:
        """Whether a reused step depends on the input of the blocks at that step."""
        return "source" in takes(self.reuse)

    @property
    def needs_source(self) -> bool:
        """Whether it must be proved which input of the blocks each output continues."""
        return "source" in (*takes(self.keep), *takes(self.reuse))

    @property
    def needs_time(self) -> bool:
        """Whether the time of a step is used."""
        functions = [self.keep, self.reuse, *([self.keep_shared] if self.keep_shared else [])]
        return any("time" in takes(function) for function in functions)


_TAKEN = {"reference", "reuse_until", "reuse_left", "change", "indicator", "step"}


def _check_names(kind: str, names: Iterable[str]) -> None:
    names = list(names)
    if bad := [name for name in names if not name.isidentifier() or name in _TAKEN or names.count(name) > 1]:
        raise ConfigError(
            f"{kind}: invalid slot or parameter name {bad[0]!r}. Names must be unique Python identifiers and must not be reserved."
        )


def _check_takes(kind: str, what: str, function: Callable[..., Any], known: Iterable[str]) -> None:
    known = list(known)
    if unknown := [name for name in takes(function) if name not in known]:
        raise ConfigError(f"{kind}: `{what}` has an unknown argument {unknown[0]!r}; allowed are {', '.join(known)}.")


def check_policy(name: str, policy: Policy) -> None:
    """Check the names in a policy.

    Raises:
        ConfigError: Two are equal, or `decide` takes what there is not.
    """
    kind, names = f"policy {name!r}", [*(slot.name for slot in policy.slots), *(parameter.name for parameter in policy.parameters)]
    _check_names(kind, names)
    _check_takes(kind, "decide", policy.decide, ["step", "change", *names])


def check_reuse(name: str, way: Reuse) -> None:
    """Check the names in a way of reusing.

    Raises:
        ConfigError: Two are equal, or a function takes what there is not.
    """
    kind, shared = f"reuse {name!r}", [slot.name for slot in way.shared]
    parameters = [parameter.name for parameter in way.parameters]
    _check_names(kind, [*way.slot_names, *parameters])
    moment = ["time", "step"]
    kept, kept_shared = [f"kept_{slot}" for slot in way.slot_names], [f"kept_{slot}" for slot in shared]
    _check_takes(kind, "keep", way.keep, ["output", "source", *kept, *moment])
    _check_takes(kind, "reuse", way.reuse, ["source", *kept, *parameters, *moment])
    if bool(parameters) != (way.values is not None):
        raise ConfigError(f"{kind}: `parameters` and `values` must be given together.")
    if way.keep_shared is not None:
        _check_takes(kind, "keep_shared", way.keep_shared, [*kept_shared, *moment])
    if bool(shared) != (way.keep_shared is not None):
        raise ConfigError(f"{kind}: shared slots and `keep_shared` must be given together.")


def check_indicator(name: str, change: Callable[..., Any]) -> None:
    """Check what an indicator takes.

    Raises:
        ConfigError: It is no function of features and references.
    """
    if not callable(change) or len(takes(change)) != 2:
        raise ConfigError(f"indicator {name!r} must be a function of two lists of tensors, the features and their references.")
