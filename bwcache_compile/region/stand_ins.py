"""What stands in the place of blocks while a model's own Python runs: the first block's call runs the whole stack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bwcache_compile.ir.torch_compat import pytree, wrapper_tensor
from bwcache_compile.region.chains import Chain, External, Internal
from bwcache_compile.runtime.wrapper import ModelWrapper


class ChainBroken(Exception):
    """The model does not call the blocks of a stack as it did when the stack was found; the message says how."""


class Between(Tensor):
    """What a block of a stack hands on to the next one. It has a shape and no values: nothing else may use it."""

    block: str

    @staticmethod
    def like(tensor: Tensor, block: str) -> Between:
        """Return one of a tensor's shape, dtype and device."""
        made = wrapper_tensor(Between, tensor)
        made.block = block
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Refuse every operator."""
        used = next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Between))
        raise ChainBroken(f"the model uses what {used.block} returns in {func}, and hands it not to the next block alone")


class StackRun:
    """One call of a model: the tensors of each stack as its blocks are called."""

    def __init__(self, chain: Chain, run: Callable[[Sequence[Tensor]], Sequence[Any]]) -> None:
        """Run the stack with `run` when its first block is called."""
        self._chain, self._run = chain, run
        self._given: list[Tensor] = []
        self._returned: list[list[Any]] = []

    def call(self, place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take the call of the block at a place in the stack, and return what it hands on.

        Raises:
            ChainBroken: It is called with something else than when the stack was found, or out of order.
        """
        link = self._chain.links[place]
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if place == 0:
            self._given = list({id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}.values())
            self._returned = []
        if place != len(self._returned) or spec != link.spec:
            raise ChainBroken(f"{link.path} is called with other arguments, or in another order")
        for leaf, expected in zip(leaves, link.leaves, strict=True):
            if isinstance(expected, External):
                right = expected.place < len(self._given) and leaf is self._given[expected.place]
            elif isinstance(expected, Internal):
                right = leaf is self._returned[expected.block][expected.leaf]
            else:
                right = leaf is expected or (not isinstance(leaf, Tensor) and type(leaf) is type(expected) and leaf == expected)
            if not right:
                raise ChainBroken(f"{link.path} is called with another {type(leaf).__name__} than when its stack was found")
        if place == len(self._chain.links) - 1:
            outputs = list(self._run(self._given))
        else:
            outputs = [None if at is None else Between.like(self._given[at], link.path) for at in link.like]
        self._returned.append(outputs)
        return pytree.tree_unflatten(outputs, link.out_spec)


class StandIn(ModelWrapper):
    """Looks like a block and runs no block."""

    def __init__(self, original: nn.Module, run: StackRun, place: int) -> None:
        """Stand for the block at a place of a stack."""
        super().__init__(original)
        self.__dict__["_stack"] = (run, place)
        self._seal()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Hand the call to the run of the stack."""
        run, place = self.__dict__["_stack"]
        return run.call(place, args, kwargs)
