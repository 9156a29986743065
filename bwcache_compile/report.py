"""What a run did: steps computed and reused, and what the indicator measured. Takes torch's tensors and numpy's arrays."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclasses.dataclass(frozen=True)
class RawStep:
    """One step as it was noted while running, nothing read from the device.

    Attributes:
        step: Index of the step.
        computed: Whether it computed; bool[regions] where the graph decided.
        fresh: Whether there was nothing to compare with.
        change: float32[blocks], see `StepRecord`.
    """

    step: int
    computed: bool | Tensor
    fresh: bool
    change: Tensor | Any | None

    @property
    def flags(self) -> tuple[bool, ...]:
        """Whether each region computed; a single one unless blocks are guarded on their own. Waits for the device if the graph decided."""
        return (self.computed,) if isinstance(self.computed, bool) else tuple(self.computed.tolist())


def mean_change(change: Any, flags: tuple[bool, ...]) -> float:
    """Return the mean change over the measured blocks; with a guard per block over those that computed."""
    return float((change[list(flags)] if len(flags) > 1 else change).mean())


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One step of one context.

    Attributes:
        step: Index of the step.
        computed: False if it reused; with a guard per block, whether any block computed.
        gap: Steps since the last computed one, on a computed step that has one before it; a change measured over a
            longer gap is larger by itself.
        change: float32[blocks] on a computed step of a policy that measures: the relative change of each block.
        blocks_computed: With a guard per block: whether each block computed, in execution order.
    """

    step: int
    computed: bool
    gap: int | None = None
    change: Tensor | None = None
    blocks_computed: tuple[bool, ...] = ()

    @property
    def indicator(self) -> float | None:
        """Mean change over the measured blocks; None where nothing was measured or there was nothing to compare with.

        With a guard per block: over the blocks that computed.
        """
        if self.change is None or self.gap is None:
            return None
        return mean_change(self.change, self.blocks_computed)

    def to_dict(self) -> dict[str, Any]:
        """Return the step as plain data; `change` is left out where there was nothing to compare with."""
        change = None if self.change is None or self.gap is None else [float(value) for value in self.change.reshape(-1).tolist()]
        return {**vars(self), "indicator": self.indicator, "change": change, "blocks_computed": list(self.blocks_computed)}


def step_records(steps: Sequence[RawStep]) -> tuple[StepRecord, ...]:
    """Read what was noted. The only place where a report waits for the device."""
    records: list[StepRecord] = []
    last: int | None = None
    for raw in steps:
        flags = raw.flags
        computed = any(flags)
        gap = None if raw.fresh or last is None or not computed else raw.step - last
        records.append(StepRecord(raw.step, computed, gap, raw.change if computed else None, flags if len(flags) > 1 else ()))
        last = raw.step if computed else last
    return tuple(records)


@dataclasses.dataclass(frozen=True)
class ContextReport:
    """The current generation of one context: its steps in order, and what happened to its cache besides.

    Attributes:
        name: The context's name.
        steps: What each step did.
        events: What happened besides computing and reusing.
        state_bytes: Bytes of its cache while the generation runs; they are freed at its last step.
        began: Why the generation began.
    """

    name: str
    steps: tuple[StepRecord, ...]
    events: tuple[str, ...]
    state_bytes: int
    began: str = ""

    @property
    def computed(self) -> int:
        """Number of computed steps."""
        return sum(record.computed for record in self.steps)

    @property
    def reused(self) -> int:
        """Number of reused steps."""
        return len(self.steps) - self.computed

    def to_dict(self) -> dict[str, Any]:
        """Return the generation as plain data."""
        return {
            "computed": self.computed,
            "reused": self.reused,
            "began": self.began,
            "state_bytes": self.state_bytes,
            "events": list(self.events),
            "steps": [record.to_dict() for record in self.steps],
        }

    @property
    def reused_by_block(self) -> tuple[int, ...]:
        """With a guard per block: how often each block was reused, in execution order; else empty."""
        rows = [record.blocks_computed for record in self.steps if record.blocks_computed]
        return tuple(sum(not computed for computed in column) for column in zip(*rows, strict=True))

    def smallest(self, first: int = 1) -> StepRecord | None:
        """Return the step from `first` on, the last one excepted, with the smallest finite indicator."""
        measured = [r for r in self.steps[:-1] if r.step >= first and r.indicator is not None and math.isfinite(r.indicator)]
        return min(measured, key=lambda r: r.indicator or 0.0, default=None)


def _mark(record: StepRecord) -> str:
    """Print a step as one character: computed, reused, or some blocks of it."""
    if not record.computed:
        return "."
    return "#" if all(record.blocks_computed) else "+"


@dataclasses.dataclass(frozen=True)
class Report:
    """Every context's current generation.

    Attributes:
        contexts: By name.
        blocks: The measured blocks, in the order of each record's `change`.
        captures: How often the model was captured, each time for another signature or after a change of its modules.
    """

    contexts: dict[str, ContextReport]
    blocks: tuple[str, ...]
    captures: int = 0

    @property
    def warnings(self) -> tuple[str, ...]:
        """Everything that happened to a cache besides computing and reusing."""
        return tuple(f"{context.name}: {event}" for context in self.contexts.values() for event in context.events)

    def to_dict(self) -> dict[str, Any]:
        """Return every context's generation as plain data: what `json.dumps` takes, where numbers are finite."""
        contexts = {name: context.to_dict() for name, context in self.contexts.items()}
        return {"contexts": contexts, "blocks": list(self.blocks), "captures": self.captures, "warnings": list(self.warnings)}

    def records(self) -> list[dict[str, Any]]:
        """Return a flat dictionary for each step of each context, as `pandas.DataFrame` and `polars.DataFrame` take them.

        `context`, `step`, `computed`, `gap` and `indicator` as in `StepRecord`; None where there is no value.
        """
        return [
            {"context": name, "step": record.step, "computed": record.computed, "gap": record.gap, "indicator": record.indicator}
            for name, context in self.contexts.items()
            for record in context.steps
        ]

    def __str__(self) -> str:
        """Print one line per context, its computed steps marked, then the warnings."""
        lines = []
        for context in self.contexts.values():
            pattern = "".join(_mark(record) for record in context.steps)
            blocks = context.reused_by_block
            share = f" ({sum(blocks)} of {len(blocks) * len(context.steps)} block runs)" if blocks else ""
            lines.append(f"{context.name}: {context.computed} computed, {context.reused} reused{share}  {pattern}")
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])
