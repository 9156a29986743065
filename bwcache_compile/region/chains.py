"""Find the stacks of blocks among the recorded calls of a model: calls that hand their outputs on to one another and nothing else."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bwcache_compile.ir.torch_compat import TreeSpec
from bwcache_compile.region.calls import ModuleCall
from bwcache_compile.region.work import is_worth_caching

_CONSTANTS = (int, float, complex, str, bytes, slice, range, enum.Enum, torch.dtype, torch.device, type(None))
"""What may be built into the graph of a stack. Any other object may hold tensors, whose values of one call would be built in with it."""


@dataclasses.dataclass(frozen=True)
class External:
    """A tensor that the first block is given: its place among these."""

    place: int


@dataclasses.dataclass(frozen=True)
class Internal:
    """What an earlier block of the chain returned: its place in the chain, and that of the leaf in its output."""

    block: int
    leaf: int


Leaf = External | Internal | Any
"""Where an argument of a block comes from; anything else is the value itself."""


@dataclasses.dataclass(frozen=True)
class Link:
    """How a block of a chain is called.

    Attributes:
        path: Of the module in the model.
        leaves: Where each leaf of its arguments comes from.
        spec: How they make `(args, kwargs)`.
        like: For each leaf of its output, the place of a tensor of the first block's that has its shape and dtype; None for no tensor.
        out_spec: How these leaves make what it returns.
    """

    path: str
    leaves: tuple[Leaf, ...]
    spec: TreeSpec
    like: tuple[int | None, ...]
    out_spec: TreeSpec


@dataclasses.dataclass(frozen=True)
class Chain:
    """A stack of blocks.

    Attributes:
        links: Its blocks, in the order in which they are called.
        work: Multiplications and additions of their matrix products, convolutions and attention.
    """

    links: tuple[Link, ...]
    work: int

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the blocks."""
        return tuple(link.path for link in self.links)


class _Growing:
    """A chain to which calls are added while they continue it."""

    def __init__(self, first: ModuleCall) -> None:
        self.links: list[Link] = []
        self._external: dict[int, int] = {}
        self._internal: dict[int, Internal] = {}
        self._versions: dict[int, int] = {}
        self._tensors: list[Tensor] = []
        for leaf in first.leaves:
            if isinstance(leaf, Tensor) and id(leaf) not in self._external:
                self._external[id(leaf)] = len(self._tensors)
                self._tensors.append(leaf)
        self.first = first.path
        self.reason = self._add(first)

    def _add(self, call: ModuleCall) -> str:
        """Add a call; say why it cannot be added."""
        leaves: list[Leaf] = []
        for leaf in call.leaves:
            if not isinstance(leaf, Tensor):
                if not isinstance(leaf, _CONSTANTS):
                    return f"{call.path} is given a {type(leaf).__name__}, and what it holds may be another thing at the next call"
                leaves.append(leaf)
                continue
            source = self._internal.get(id(leaf))
            place = self._external.get(id(leaf))
            if source is None and place is None:
                shape = list(leaf.shape)
                return f"{call.path} takes a tensor of shape {shape} that neither {self.first} is given nor a block of the stack returned"
            if self._versions.get(id(leaf), call.versions[id(leaf)]) != call.versions[id(leaf)]:
                return f"a tensor of shape {list(leaf.shape)} is edited in place before {call.path} takes it"
            leaves.append(source if source is not None else External(place or 0))
        like = tuple(self._alike(output) if isinstance(output, Tensor) else None for output in call.outputs)
        if any(place is None and output is not None for place, output in zip(like, call.outputs, strict=True)):
            return f"{call.path} returns something whose shape no input of {self.first} has"
        self.links.append(Link(call.path, tuple(leaves), call.spec, like, call.out_spec))
        for number, output in enumerate(call.outputs):
            if isinstance(output, Tensor):
                self._internal[id(output)] = Internal(len(self.links) - 1, number)
        self._versions |= call.versions
        return ""

    def _alike(self, output: Tensor) -> int | None:
        """Return the place of a tensor of this shape and dtype."""
        alike = (place for place, tensor in enumerate(self._tensors) if (tensor.shape, tensor.dtype) == (output.shape, output.dtype))
        return next(alike, None)

    def continues(self, call: ModuleCall) -> str:
        """Add a call that takes what the last block returned; say why it does not continue the chain."""
        last = len(self.links) - 1
        taken = [self._internal.get(id(leaf)) for leaf in call.leaves if isinstance(leaf, Tensor)]
        if not any(source is not None and source.block == last for source in taken):
            return f"{call.path} takes nothing that {self.links[-1].path} returned"
        return self._add(call)


def chains(calls: Sequence[ModuleCall]) -> tuple[list[Chain], list[str]]:
    """Return the stacks that are worth caching, in the order in which they run, and why the others are not.

    A chain is worth it if it has two blocks or more and at least a fifth of the work of the largest one.

    Args:
        calls: As `record` returned them.
    """
    found: list[list[Link]] = []
    reasons: list[str] = []
    growing: _Growing | None = None
    for call in calls:
        if growing is not None and not growing.reason:
            reason = growing.continues(call)
            if not reason:
                continue
            reasons.append(reason)
            found.append(growing.links)
        growing = _Growing(call)
        if growing.reason:
            reasons.append(growing.reason)
    if growing is not None and not growing.reason:
        found.append(growing.links)
    work = {call.path: call.work for call in calls}
    long = [Chain(tuple(links), sum(work[link.path] for link in links)) for links in found if len(links) > 1]
    largest = max((chain.work for chain in long), default=0)
    small = [chain for chain in long if not is_worth_caching(chain.work, largest)]
    reasons += [f"the stack of {chain.paths[0]} has less than a fifth of the work of the largest one" for chain in small]
    return [chain for chain in long if chain not in small], reasons
