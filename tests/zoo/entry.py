"""What one model class of the zoo is: its tiny configuration, its inputs, and what must be found in it."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Entry:
    """A diffusers model class at a tiny size.

    Attributes:
        model: Name of the class.
        config: Its keyword arguments.
        inputs: Keyword arguments of the call at one step.
        stacks: Names of the main stacks' module lists, with the configured number of blocks.
        streams: Block inputs that the blocks' outputs continue, in output order.
        rows: The rows that the output takes, of a stream that holds text or frames of the past beside them.
        in_turn: The stacks' blocks run in turn (spatial, temporal, spatial, ...) instead of stack after stack.
        continued: What the last block's outputs continue, from those inputs, where it is neither these nor these joined in order.
        warned: Way of reuse to the part of the model that a capture warns of, as it is large at this size and is not cached.
        never_captured: What the refusal says, where the model cannot be captured or cached at all.
        needs: A module that the class imports and that may be absent.
    """

    model: str
    config: dict[str, Any]
    inputs: Callable[[int], dict[str, Any]]
    stacks: dict[str, int]
    streams: tuple[str, ...] = ("hidden_states",)
    rows: slice = dataclasses.field(default_factory=lambda: slice(None))
    in_turn: bool = False
    continued: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] | None = None
    warned: Mapping[str, str] = dataclasses.field(default_factory=dict)
    never_captured: str | None = None
    needs: str | None = None

    def make(self) -> nn.Module:
        """Build the model in evaluation mode; every weight is drawn, zero-initialised gates too, so that blocks matter."""
        torch.manual_seed(0)
        model: nn.Module = getattr(importlib.import_module("diffusers"), self.model)(**self.config)
        model.eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() < 2 or not parameter.any() or not parameter.isfinite().all():
                drawn = torch.randn_like(parameter) * 0.1
                parameter.data = torch.where((parameter == 0) | ~parameter.isfinite(), drawn, parameter)
        return model

    def block_names(self) -> list[str]:
        """Return the paths of the main stacks' blocks in execution order."""
        names = [f"{stack}.{i}" for stack, count in self.stacks.items() for i in range(count)]
        return sorted(names, key=lambda name: int(name.rpartition(".")[2])) if self.in_turn else names

    def call(self, step: int) -> dict[str, Any]:
        """Return one step's inputs in the order in which a capture binds them."""
        return dict(sorted(self.inputs(step).items()))


def noise(name: str, step: int, *shape: int) -> Tensor:
    """Draw a tensor that moves a little from step to step, as latents do."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    base, drift = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    return base + 0.05 * step * drift


def time(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the timestep of a step."""
    return torch.tensor([900 - 40 * step], dtype=dtype)


def rotary(places: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of a rotary embedding."""
    return noise("cos", 0, places, width), noise("sin", 0, places, width)
