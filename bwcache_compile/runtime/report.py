"""What a run did: steps computed and reused, and what the indicator measured."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One step of one context.

    Attributes:
        step: Index of the step.
        computed: False if it reused.
        gap: Steps since the last computed one, on a computed step that has one before it; a change measured over a
            longer gap is larger by itself.
        change: float32[blocks] on a computed step of a policy that measures: the relative change of each block.
    """

    step: int
    computed: bool
    gap: int | None = None
    change: Tensor | None = None

    @property
    def indicator(self) -> float | None:
        """Mean change over the measured blocks; None where nothing was measured or there was nothing to compare with."""
        if self.change is None or self.gap is None:
            return None
        return float(self.change.mean())


@dataclasses.dataclass(frozen=True)
class ContextReport:
    """The current generation of one context: its steps in order, and what happened to its cache besides."""

    name: str
    steps: tuple[StepRecord, ...]
    events: tuple[str, ...]
    state_bytes: int

    @property
    def computed(self) -> int:
        """Number of computed steps."""
        return sum(record.computed for record in self.steps)

    @property
    def reused(self) -> int:
        """Number of reused steps."""
        return len(self.steps) - self.computed

    def smallest(self, first: int = 1) -> StepRecord | None:
        """Return the step from `first` on, the last one excepted, with the smallest finite indicator."""
        measured = [r for r in self.steps[:-1] if r.step >= first and r.indicator is not None and math.isfinite(r.indicator)]
        return min(measured, key=lambda r: r.indicator or 0.0, default=None)


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

    def __str__(self) -> str:
        """Print one line per context, its computed steps marked, then the warnings."""
        lines = []
        for context in self.contexts.values():
            pattern = "".join("#" if record.computed else "." for record in context.steps)
            lines.append(f"{context.name}: {context.computed} computed, {context.reused} reused  {pattern}")
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])
