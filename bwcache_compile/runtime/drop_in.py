"""What all cached models have in common, whatever is captured of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.fx import GraphModule

from bwcache_compile.config import CacheConfig
from bwcache_compile.context_methods import ContextMethods
from bwcache_compile.errors import StateError
from bwcache_compile.report import Report
from bwcache_compile.runtime.wrapper import ModelWrapper


class DropIn(ModelWrapper, ContextMethods):
    """What `transform` returns: called like the model that it wraps, it computes or reuses.

    Attributes:
        cache_config: The settings in force.
    """

    cache_config: CacheConfig

    @property
    def original(self) -> nn.Module:
        """The model that is wrapped."""
        return self._original

    def with_settings(self, config: CacheConfig) -> DropIn:
        """Return another cached model of the same model: its settings and its contexts are its own."""
        raise NotImplementedError

    def configure(self, config: CacheConfig | Mapping[str, Any] | None = None, /, **changes: Any) -> None:
        """Change settings, or replace them all."""
        raise NotImplementedError

    def invalidate(self) -> None:
        """Take the weights for changed."""
        raise NotImplementedError

    def close(self) -> None:
        """Free every cache."""
        raise NotImplementedError

    def compile(self, **options: Any) -> None:
        """Compile what a step runs with `torch.compile(**options)`."""
        raise NotImplementedError

    def report(self) -> Report:
        """Return what each context did in its current generation."""
        raise NotImplementedError

    def _changed(self) -> None:
        self.invalidate()


def _is_flat(model: nn.Module) -> bool:
    """Whether a model is an exported graph, whose mode is fixed, and which does not support `eval()`."""
    if not isinstance(model, GraphModule):
        return False
    return all(node.op != "call_module" or node.target == "_guards_fn" for node in model.graph.nodes)


def refuse_training(model: nn.Module) -> None:
    """Refuse a model in training mode.

    Raises:
        StateError: It is.
    """
    if model.training and not _is_flat(model):
        raise StateError(f"{type(model).__name__} is in training mode; call .eval() first: caching is for inference.")
