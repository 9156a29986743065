"""What the drop-ins share for models of which there is no whole graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from bwcache_compile.config import CacheConfig
from bwcache_compile.context_methods import ContextMethods
from bwcache_compile.errors import StateError
from bwcache_compile.runtime.wrapper import ModelWrapper


class UncapturedModel(ModelWrapper, ContextMethods):
    """A drop-in whose calls run the original's own Python.

    Attributes:
        cache_config: The settings in force.
    """

    cache_config: CacheConfig
    compiles: ClassVar[str]
    """What `compile` compiles."""

    @property
    def original(self) -> nn.Module:
        """The model that is wrapped."""
        return self._original

    def _check_call(self) -> None:
        """Refuse calls that cannot be cached.

        Raises:
            StateError: The model is in training mode, or `torch.compile` was called on the drop-in.
        """
        name = type(self._original).__name__
        if self._original.training:
            raise StateError(f"{name} is in training mode; call .eval() first: caching is for inference.")
        if self.__dict__["_is_torch_compile"]:
            raise StateError(
                f"torch.compile would compile nothing of {name}, of which no whole graph is captured. Call cached.compile() instead, which"
                f" compiles {self.compiles}."
            )

    def _changed_settings(self, config: CacheConfig | Mapping[str, Any] | None, changes: Mapping[str, Any]) -> CacheConfig:
        """Return what `configure` was given as settings: all of them, or changes of those in force.

        Raises:
            ConfigError: A value is bad, or there is no setting of that name.
        """
        given = CacheConfig.of(self.cache_config if config is None or isinstance(config, Mapping) else config)
        return CacheConfig.of(given, **{**(config if isinstance(config, Mapping) else {}), **changes})

    def invalidate(self) -> None:
        """Take the weights for changed."""
        raise NotImplementedError

    def _changed(self) -> None:
        self.invalidate()
