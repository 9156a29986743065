"""Add what the blocks added at the last computed step to their input of this step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bwcache_compile.policies.definitions import Reuse

if TYPE_CHECKING:
    from torch import Tensor


def residual(output: Tensor, source: Tensor) -> Tensor:
    """What the blocks added to their input; kept instead of the output."""
    return output - source


def add_residual(source: Tensor, kept_output: Tensor) -> Tensor:
    """Input of this step plus what the blocks last added to their input."""
    return source + kept_output


RESIDUAL = Reuse(keep=residual, reuse=add_residual)
