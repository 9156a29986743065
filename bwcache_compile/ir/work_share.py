"""How much of a model's work a reused step skips, and what it still runs. Torch-free."""

from __future__ import annotations

import dataclasses
from typing import Any

WARN_ABOVE = 0.2
"""Share of the work outside the blocks on a reused step from which on a capture warns."""

_LEAST = 0.01
"""Parts of the model with a smaller share are not listed, stacks excepted."""


@dataclasses.dataclass(frozen=True)
class Uncached:
    """A part of the model that is not cached.

    Attributes:
        name: Path of a stack, or of a module; empty for operators outside all modules.
        modules: How many modules the stack has; 0 for what is no stack.
        share: Its share of the model's work.
        reused: The share that a reused step runs: 0 where only the cached blocks read what it computes.
        reason: Why it is not cached.
    """

    name: str
    modules: int
    share: float
    reused: float
    reason: str

    def __str__(self) -> str:
        """Name the part with its shares and the reason."""
        count = f"{self.modules} modules, " if self.modules else ""
        skipped = "" if self.reused or not self.share else " that a reused step skips too"
        return f"{self.name or 'operators outside all modules'} ({count}{self.share:.0%} of the work{skipped}) is not cached: {self.reason}"


@dataclasses.dataclass(frozen=True)
class WorkShare:
    """Shares of a model's work: the multiply-adds of matrix products, convolutions and attention at the captured sizes.

    Attributes:
        cached: The share that a reused step skips: the cached blocks, and what is computed for them alone.
        outside: The share that a reused step runs outside the blocks that were found. Blocks that `compute_first` and
            `compute_last` leave out do not count.
        parts: What is not cached: the stacks that were turned down, then other modules.
        chosen: Whether the user named the blocks.
    """

    cached: float
    outside: float = 0.0
    parts: tuple[Uncached, ...] = ()
    chosen: bool = False

    def __str__(self) -> str:
        """Say how much is skipped."""
        return f"{self.cached:.1%} of the work is skipped on a reused step (multiply-adds of matrix products, convolutions and attention)"

    @property
    def stacks(self) -> tuple[Uncached, ...]:
        """The stacks that are not cached."""
        return tuple(part for part in self.parts if part.modules)

    def to_dict(self) -> dict[str, Any]:
        """Return the shares as plain data."""
        return dataclasses.asdict(self)

    def warning(self, model: str) -> str | None:
        """Return a warning where the blocks that were found are too small a part of the model."""
        if self.chosen or self.outside <= WARN_ABOVE:
            return None
        parts = sorted((part for part in self.parts if part.reused >= _LEAST), key=lambda part: -part.reused)
        lines = "".join(f"\n  {part}" for part in parts)
        return (
            f"a reused step of {model} still runs {self.outside:.0%} of the work (multiply-adds of matrix products, convolutions and"
            f" attention) outside the cached blocks:{lines}\n"
            '  Pass blocks=["<path of a stack>", ...] to choose what is cached; `print(cached.plan)` lists every stack that is not.'
        )
