"""A stack of blocks as a module of its own, which is captured like any other model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bwcache_compile.ir.torch_compat import pytree
from bwcache_compile.region.chains import Chain, External, Internal
from bwcache_compile.runtime.notes import UNREAD_FIRST


class Stack(nn.Module):
    """Calls the blocks of a chain one after the other. The blocks are the model's own, under their paths there."""

    def __init__(self, model: nn.Module, chain: Chain, unread: int) -> None:
        """Take the blocks of a model.

        Args:
            model: The model.
            chain: How it calls them.
            unread: How many leading inputs nothing reads: they tell the time of the model's call, by which runs are told apart.
        """
        super().__init__()
        self.chain = chain
        setattr(self, UNREAD_FIRST, unread)
        for path in chain.paths:
            owner: nn.Module = self
            *above, name = path.split(".")
            for part in above:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.add_module(name, model.get_submodule(path))
        for module in (self, *(part for path, part in self.named_modules() if path not in chain.paths and type(part) is nn.Module)):
            module.training = False  # whether the model trains is asked where it is called

    def forward(self, *tensors: Tensor) -> tuple[Any, ...]:
        """Return the leaves of what the last block returns.

        Args:
            tensors: The unread ones, then the tensors that the first block is given.
        """
        given = tensors[getattr(self, UNREAD_FIRST) :]
        returned: list[list[Any]] = []
        for link in self.chain.links:
            leaves = [
                given[leaf.place] if isinstance(leaf, External) else returned[leaf.block][leaf.leaf] if isinstance(leaf, Internal) else leaf
                for leaf in link.leaves
            ]
            args, kwargs = pytree.tree_unflatten(leaves, link.spec)
            returned.append(pytree.tree_leaves(self.get_submodule(link.path)(*args, **kwargs)))
        return tuple(returned[-1])
