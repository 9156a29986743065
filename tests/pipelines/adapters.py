"""Low-rank adapters put in as peft does it: linear layers replaced by layers that hold them, settings in dictionaries and lists."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LoraLinear(nn.Module):
    """A linear layer with an adapter beside it, which may be merged into its weight."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        generator = torch.Generator().manual_seed(base_layer.in_features)
        self.lora_A = nn.Parameter(torch.randn(2, base_layer.in_features, generator=generator) * 0.3, requires_grad=False)
        self.lora_B = nn.Parameter(torch.randn(base_layer.out_features, 2, generator=generator) * 0.3, requires_grad=False)
        self.scaling = {"default": 1.0}
        self.merged_adapters: list[str] = []

    def delta(self) -> Tensor:
        return self.lora_B @ self.lora_A * self.scaling["default"]

    def forward(self, x: Tensor) -> Tensor:
        out = self.base_layer(x)
        return out if self.merged_adapters else out + x @ self.lora_A.T @ self.lora_B.T * self.scaling["default"]


def _layers(model: nn.Module) -> list[LoraLinear]:
    return [module for module in model.modules() if isinstance(module, LoraLinear)]


def load(model: nn.Module) -> None:
    """Put an adapter on every query projection."""
    for module in list(model.modules()):
        if isinstance(getattr(module, "to_q", None), nn.Linear):
            module.to_q = LoraLinear(module.to_q).eval()
    assert _layers(model)


def scale(model: nn.Module) -> None:
    """Set the adapter's strength, in place."""
    for layer in _layers(model):
        layer.scaling["default"] = 0.25


def fuse(model: nn.Module) -> None:
    """Add the adapter to the weights, where no version counts it."""
    for layer in _layers(model):
        layer.base_layer.weight.data += layer.delta()
        layer.merged_adapters.append("default")


def unfuse(model: nn.Module) -> None:
    """Take the adapter out of the weights again."""
    for layer in _layers(model):
        layer.base_layer.weight.data -= layer.delta()
        layer.merged_adapters.pop()


def unload(model: nn.Module) -> None:
    """Put the linear layers back."""
    for module in list(model.modules()):
        if isinstance(getattr(module, "to_q", None), LoraLinear):
            module.to_q = module.to_q.base_layer
