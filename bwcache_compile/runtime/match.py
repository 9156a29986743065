"""The program that serves a call."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

from bwcache_compile.runtime.runnable import RunnableProgram
from bwcache_compile.runtime.signature import CallKey, generation_kind
from bwcache_compile.size_expressions import evaluated


@dataclasses.dataclass(frozen=True)
class ProgramMatch:
    """The program that serves a call, and what was true of the call and the model.

    Attributes:
        runnable: The program.
        key: What the call looks like; another one means other inputs, so another generation.
        sizes: The values of the program's symbols at this call; empty where no size is open.
        version: The model's structure and weights; another one means that what is cached came from another model.
        changed: What changed in the model's structure last, for messages.
        first: What the program's graph returned for this very call on a fresh state at step 0, if it was just checked on this call.
    """

    runnable: RunnableProgram
    key: CallKey
    sizes: Mapping[str, int]
    version: tuple[int, int]
    changed: str
    first: list[Any] | None = None

    @property
    def signature(self) -> Hashable:
        """What the inputs of one generation have in common: everything but the float dtype of what may be the time."""
        return generation_kind(self.key.kind), self.key.sizes, self.key.values

    @property
    def slot_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the slots at this call."""
        return [evaluated(slot.shape, self.sizes) for slot in self.runnable.slots]
