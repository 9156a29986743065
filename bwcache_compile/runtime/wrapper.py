"""Standing in for a module without becoming another one."""

from __future__ import annotations

from typing import Any

from torch import nn


class ModelWrapper(nn.Module):
    """A module with another module's parameters, buffers, submodules and attributes, all under the same names.

    Nothing is copied: moving, loading or editing the weights through either is seen by both. Attributes that neither
    the wrapper nor `nn.Module` has (`config`, `dtype`, `save_pretrained` ...) are the original's.
    """

    def __init__(self, original: nn.Module) -> None:
        """Share the registries of the original."""
        super().__init__()
        values = self.__dict__
        values["_parameters"], values["_buffers"], values["_modules"] = original._parameters, original._buffers, original._modules
        values["training"] = original.training
        values["_original"] = original  # past `__setattr__`: as a submodule it would prefix every name in the state dict

    def __getattr__(self, name: str) -> Any:
        """Look in the shared registries, then in the original."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__.get("_original")
            if original is None:
                raise
            return getattr(original, name)

    def train(self, mode: bool = True) -> ModelWrapper:
        """Set the mode of both."""
        self._original.train(mode)
        self.training = mode
        return self
