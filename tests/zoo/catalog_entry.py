"""One class of the catalog: a zoo entry, and how the class is captured."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from bwcache_compile.api import Cached
from bwcache_compile.api_arguments import Capture
from bwcache_compile.runtime import CachedModel
from tests.zoo.entry import Entry


@dataclasses.dataclass(frozen=True)
class CatalogEntry(Entry):
    """A diffusers model class at a tiny size, and the way of capturing that `transform(capture="auto")` takes.

    Attributes:
        capture: That way.
        besides: Modules that are found as blocks beside those of the stacks.
        uninitialized: Names of parameters that the class leaves uninitialized.
        tells_step: Calls say which step they are, as the time is an input of rank 3, of which no time is read.
    """

    capture: Capture = "whole"
    besides: tuple[str, ...] = ()
    uninitialized: tuple[str, ...] = ()
    tells_step: bool = False

    def make(self) -> nn.Module:
        """Build the model in evaluation mode with every weight drawn."""
        model = super().make()
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in self.uninitialized:
                parameter.data = torch.randn_like(parameter) * 0.1
        return model


def found_blocks(cached: Cached) -> list[str]:
    """Return the paths of the blocks that are cached."""
    whole = type(cached) is CachedModel
    return [block.name for block in cached.plan.blocks] if whole else list(cached.cached_blocks)  # type: ignore[union-attr]
