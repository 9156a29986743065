"""What the drop-ins share for models of which there is no whole graph."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import ConfigError, StateError
from bwcache_compile.runtime.drop_in import DropIn, refuse_training
from bwcache_compile.runtime.fingerprint import check_calibrated


class UncapturedModel(DropIn):
    """A drop-in whose calls run the original's own Python."""

    compiles: ClassVar[str]
    """What `compile` compiles."""

    def _check_call(self) -> None:
        """Refuse calls that cannot be cached.

        Raises:
            StateError: The model is in training mode, or `torch.compile` was called on the drop-in.
        """
        name = type(self._original).__name__
        refuse_training(self._original)
        if self.__dict__["_is_torch_compile"]:
            raise StateError(
                f"torch.compile would compile nothing of {name}, of which no whole graph is captured. Call cached.compile() instead, which"
                f" compiles {self.compiles}."
            )


def check_calibration(model: nn.Module, config: CacheConfig, how: str) -> None:
    """Refuse settings that were calibrated for another model, or with the anchors at the blocks of a graph.

    Args:
        model: The model.
        config: Its settings.
        how: How it is captured, for messages.

    Raises:
        ConfigError: The anchors are at the blocks.
        StateError: They are for another model.
    """
    if config.calibrated_for is not None and config.cut == "blocks":
        raise ConfigError(
            f"these settings were calibrated with cut='blocks' on the graph of a model, and of a model that is {how} there is no whole"
            " graph. Calibrate with cut='output'."
        )
    check_calibrated(model, config)
