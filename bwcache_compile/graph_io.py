"""Names and order of what the graphs take and return; the graphs, the runtime and the files agree by these. Needs no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

STEP, REUSE_LEFT, INDICATOR = "step", "reuse_left", "indicator"
UNTIL = "reuse_until"
"""Name of the one slot that a guard adds: the last step that reuses."""


def cache_in(slot: str) -> str:
    """Name the input that a slot is read from."""
    return f"cache_in.{slot}"


def cache_out(slot: str) -> str:
    """Name the output that holds a slot's next value."""
    return f"cache_out.{slot}"


def policy_input(parameter: str) -> str:
    """Name the input for a parameter of the policy."""
    return f"policy.{parameter}"


def user_names(names: Iterable[str], taken: Iterable[str], suffix: str) -> tuple[str, ...]:
    """Return names of the model's own inputs or outputs, each with `suffix` as often as it takes to be no other's."""
    used, free = set(taken), []
    for name in names:
        while name in used:
            name += suffix
        used.add(name)
        free.append(name)
    return tuple(free)


@dataclasses.dataclass(frozen=True)
class GraphIO:
    """What one graph takes and returns, by name and in order.

    Attributes:
        kind: `compute`, `reuse` or `guarded`.
        users: The model's own inputs, those that are no tensors too.
        slots: Slots that the graph reads.
        parameters: Parameters of the policy and of the way of reusing that it reads.
        results: The model's own outputs, those that are no tensors too.
        written: Slots whose next value it returns.
        measures: What it returns behind these: per region `reuse_left` and, if anything is measured, `indicator`.
    """

    kind: str
    users: tuple[str, ...]
    slots: tuple[str, ...]
    parameters: tuple[str, ...]
    results: tuple[str, ...]
    written: tuple[str, ...]
    measures: tuple[str, ...]
    inputs: tuple[str, ...] = dataclasses.field(init=False)
    outputs: tuple[str, ...] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        """Put the names in order."""
        inputs = (*self.users, *map(cache_in, self.slots), *map(policy_input, self.parameters), STEP)
        object.__setattr__(self, "inputs", inputs)
        object.__setattr__(self, "outputs", (*self.results, *map(cache_out, self.written), *self.measures))

    @property
    def policy_inputs(self) -> tuple[str, ...]:
        """Names of the inputs for the policy's parameters."""
        return tuple(map(policy_input, self.parameters))

    def pack(self, values: Mapping[str, Any]) -> list[Any]:
        """Return the graph's inputs in order; `values` may hold more."""
        return [values[name] for name in self.inputs]

    def unpack(self, returned: Sequence[Any]) -> dict[str, Any]:
        """Return what the graph returned by name."""
        return dict(zip(self.outputs, returned, strict=True))


def guarded_io(compute: GraphIO, reuse: GraphIO) -> GraphIO:
    """Return what the one graph takes and returns that decides by itself between a compute graph and its reuse graph."""
    slots = (*compute.written, UNTIL)
    measures = tuple(name for name in compute.measures if name != REUSE_LEFT)
    parameters = (*compute.parameters, *reuse.parameters)
    return dataclasses.replace(compute, kind="guarded", slots=slots, parameters=parameters, written=slots, measures=measures)
