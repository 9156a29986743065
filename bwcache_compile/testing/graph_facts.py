"""What `assert_cached` looks at in an exported graph, whatever format it is in."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

Size = int | str


@dataclasses.dataclass(frozen=True)
class TensorFact:
    """An input or an output: its name, dtype and shape, as far as they are known."""

    name: str
    dtype: str
    shape: tuple[Size, ...] | None

    def __str__(self) -> str:
        """Print it as `name dtype[shape]`."""
        return f"{self.name} {self.dtype}[{', '.join(map(str, self.shape)) if self.shape is not None else '?'}]"

    def fits(self, other: TensorFact) -> bool:
        """Whether the other could hold the same tensor."""
        if self.dtype != other.dtype:
            return False
        if self.shape is None or other.shape is None:
            return True
        fixed = [a == b for a, b in zip(self.shape, other.shape, strict=False) if isinstance(a, int) and isinstance(b, int)]
        return len(self.shape) == len(other.shape) and all(fixed)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One branch: how much it computes, and which inputs of the graph it depends on."""

    work: int
    reads: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Guard:
    """An `If` or a `cond`: its name, the inputs of the graph that its predicate depends on, and its branches."""

    name: str
    predicate: frozenset[str]
    arms: tuple[Arm, ...]


@dataclasses.dataclass(frozen=True)
class GraphFacts:
    """What one graph takes, returns, computes and decides.

    Attributes:
        name: For messages.
        inputs: Weights left out.
        outputs: All of them.
        read: Names of the inputs that some output depends on.
        written: Names of the outputs that an operator computes: neither an input handed on nor a constant.
        work: How much it computes, in `unit`, both branches of a decision counted.
        unit: What `work` counts.
        guards: Its decisions.
        pairs: Inputs whose next value is known to be an output, by name: buffers that a program writes to.
    """

    name: str
    inputs: tuple[TensorFact, ...]
    outputs: tuple[TensorFact, ...]
    read: frozenset[str]
    written: frozenset[str]
    work: int
    unit: str = "matrix products, convolutions and attentions"
    guards: tuple[Guard, ...] = ()
    pairs: Mapping[str, str] = dataclasses.field(default_factory=dict)


_DIRECTIONS = {"in", "out", "input", "output", "past", "present", "prev", "previous", "next", "new", "old", "updated", "cached"}


def _stem(name: str) -> tuple[tuple[str, ...], bool]:
    """Return the words of a name without those that say a direction, and whether it had such."""
    words = [word for word in re.split(r"[._/:\-]+", name.lower()) if word]
    kept = tuple(word for word in words if word not in _DIRECTIONS)
    return kept, len(kept) < len(words)


def counterparts(read: GraphFacts, written: GraphFacts) -> dict[str, str]:
    """Return the inputs of one graph whose names say that an output of the other is their next value.

    `cache_in.x` and `cache_out.x`, `past_x` and `present_x`, `x` and `next_x` belong together, if dtype and shape fit.
    """
    found = {}
    for taken in read.inputs:
        stem, directed = _stem(taken.name)
        for returned in written.outputs:
            other, other_directed = _stem(returned.name)
            if stem and stem == other and (directed or other_directed) and taken.fits(returned):
                found[taken.name] = returned.name
    return found
