"""A graph that is a sequence of packages, called one after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from torch import Tensor

from bwcache_compile.bundle.manifest import SequenceEntry
from bwcache_compile.errors import BundleError, first_line

Graph = Callable[..., Sequence[Tensor]]


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of a package, and the values that nothing reads after it."""

    file: str
    run: Graph
    weights: list[Tensor]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dropped: tuple[str, ...]


class PackageSequence:
    """Calls packages one after another, each with its weights; called like a graph whose weights are built in.

    A value is dropped after the last call that reads it, so that what one block hands to the next is not kept.
    """

    def __init__(self, inputs: Sequence[str], entry: SequenceEntry, opened: Sequence[tuple[Graph, list[Tensor]]]) -> None:
        """Put the calls in order.

        Args:
            inputs: Names of the graph's inputs, in order.
            entry: The calls; it was checked that each reads what there is.
            opened: Of each call its package and its weights.
        """
        self._inputs, self._returned = tuple(inputs), entry.returned
        kept, calls = set(entry.returned), list[_Call]()
        for call, (run, weights) in zip(entry.calls[::-1], opened[::-1], strict=True):
            dropped = tuple(dict.fromkeys(name for name in (*call.inputs, *call.outputs) if name not in kept))
            kept.update(call.inputs)
            calls.append(_Call(call.file, run, weights, call.inputs, call.outputs, dropped))
        self._calls = calls[::-1]

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Return the graph's outputs.

        Raises:
            BundleError: A package failed.
        """
        values = dict(zip(self._inputs, inputs, strict=True))
        for call in self._calls:
            try:
                returned = call.run(*call.weights, *(values[name] for name in call.inputs))
                values.update(zip(call.outputs, returned, strict=True))
            except Exception as error:  # operators raise what they like
                raise BundleError(f"torch failed to run {call.file}: {type(error).__name__}: {first_line(error)}") from error
            del returned
            for name in call.dropped:
                del values[name]
        return [values[name] for name in self._returned]
