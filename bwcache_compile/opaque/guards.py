"""What stands in the place of blocks at a step: it runs each block and writes down what it returned, or returns what is cached."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bwcache_compile.errors import UnsupportedGraphError
from bwcache_compile.ir.torch_compat import TreeSpec, pytree
from bwcache_compile.region.calls import write_count
from bwcache_compile.runtime.compilation import uses_cuda_graphs
from bwcache_compile.runtime.wrapper import ModelWrapper


class CallsChanged(Exception):
    """A reused step calls the blocks differently than the last computed step did; the message says how."""


@dataclasses.dataclass(frozen=True)
class CallPlace:
    """One call of a block at a step.

    Attributes:
        path: Of the block's module.
        number: How often the module was called before at this step.
    """

    path: str
    number: int

    def __str__(self) -> str:
        """Name the call."""
        return self.path if self.number == 0 else f"{self.path} (call {self.number + 1})"


@dataclasses.dataclass(frozen=True)
class BlockCall:
    """What a block was given and what it returned.

    Attributes:
        given: Structure of its arguments, with shape and dtype of each tensor.
        outputs: Leaves of what it returned.
        out_spec: How they make it.
    """

    given: Hashable
    outputs: tuple[Any, ...]
    out_spec: TreeSpec


class StepCalls(Protocol):
    """Takes the calls of the blocks at one step."""

    def call(self, place: CallPlace, block: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take one call and return what the model gets for it."""


def _given(leaves: list[Any], spec: TreeSpec) -> Hashable:
    return str(spec), tuple((tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves)


def compiled_block(block: nn.Module, options: Mapping[str, Any]) -> Callable[..., Any]:
    """Compile a block with these options of `torch.compile`; where CUDA graphs are replayed, copy what it returns.

    The next replay, that of another block, overwrites what the one before it returned.
    """
    compiled: Callable[..., Any] = torch.compile(block, **options)
    if not uses_cuda_graphs(options):
        return compiled

    def copied(*args: Any, **kwargs: Any) -> Any:
        return pytree.tree_map_only(Tensor, Tensor.clone, compiled(*args, **kwargs))

    return copied


class ComputeCalls:
    """Runs every block.

    Attributes:
        done: Each call, in order.
    """

    def __init__(self) -> None:
        """Start before the first block."""
        self.done: dict[CallPlace, BlockCall] = {}

    def call(self, place: CallPlace, block: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a block and write down what it returned.

        Raises:
            UnsupportedGraphError: It writes to a tensor that it is given.
        """
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        before = [write_count(tensor) for tensor in tensors]
        returned = block(*args, **kwargs)
        for tensor, count in zip(tensors, before, strict=True):
            if write_count(tensor) != count:
                raise UnsupportedGraphError(
                    f"{place} writes in place to a tensor of shape {list(tensor.shape)} that it is given. A reused step would skip that"
                    " write. Return the value instead."
                )
        outputs, out_spec = pytree.tree_flatten(returned)
        # a copy: what follows in the model may write to what the block returned
        copies = tuple(leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in outputs)
        self.done[place] = BlockCall(_given(leaves, spec), copies, out_spec)
        return returned


class ReuseCalls:
    """Runs no block."""

    def __init__(self, cached: Mapping[CallPlace, BlockCall], reused: Callable[[CallPlace], tuple[Any, ...]]) -> None:
        """Return for each call what `reused` makes of what is cached of it."""
        self._cached, self._reused = cached, reused
        self._seen: set[CallPlace] = set()

    def call(self, place: CallPlace, block: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what is cached of a call.

        Raises:
            CallsChanged: The last computed step had no such call, or with other shapes or dtypes.
        """
        known = self._cached.get(place)
        if known is None:
            raise CallsChanged(f"{place} is called, which the last computed step did not call")
        if _given(*pytree.tree_flatten((args, kwargs))) != known.given:
            raise CallsChanged(f"{place} is called with other shapes, dtypes or kinds of arguments than at the last computed step")
        self._seen.add(place)
        return pytree.tree_unflatten(self._reused(place), known.out_spec)

    def check_complete(self) -> None:
        """Check that every cached call was made.

        Raises:
            CallsChanged: One was not.
        """
        missing = next((place for place in self._cached if place not in self._seen), None)
        if missing is not None:
            raise CallsChanged(f"{missing} is not called, which the last computed step called")


class Guard(ModelWrapper):
    """Looks like a block, and hands its calls to the step."""

    def __init__(self, original: nn.Module, path: str, run: Callable[..., Any], calls: StepCalls, numbers: Counter[str]) -> None:
        """Stand for a block.

        Args:
            original: The block.
            path: Of the block in the model.
            run: What runs it: the block, or the same compiled.
            calls: Those of the step.
            numbers: How often each block was called at the step.
        """
        super().__init__(original)
        self.__dict__["_step"] = (path, run, calls, numbers)
        self._seal()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Hand the call to the step."""
        path, run, calls, numbers = self.__dict__["_step"]
        place = CallPlace(path, numbers[path])
        numbers[path] += 1
        return calls.call(place, run, args, kwargs)
