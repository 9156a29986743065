"""What the indicator takes of the outputs of blocks, while a model's own Python runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from bwcache_compile.config import CacheConfig
from bwcache_compile.ir.ranks import Ranks
from bwcache_compile.ir.torch_compat import pytree
from bwcache_compile.opaque.guards import BlockCall, CallPlace
from bwcache_compile.policies import POLICIES
from bwcache_compile.policies.sampling import measured_blocks, sampled_of_part, sampled_tokens


def _feature(outputs: Sequence[Any]) -> Tensor | None:
    """Return the first floating output of rank 2 or more."""
    return next((leaf for leaf in outputs if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 1), None)


def _sample(config: CacheConfig, feature: Tensor, number: int, ranks: Ranks | None) -> Tensor:
    """Take the measured tokens of the feature with this number."""
    if config.indicator_tokens == "all":
        return feature
    rows, stride, device = feature.reshape(-1, feature.shape[-1]), config.indicator_tokens, feature.device
    if ranks is None or ranks.parts == 1:
        return rows[sampled_tokens(len(rows), stride, number, device)]
    batch = feature.shape[0] if feature.dim() > 2 else 1
    return rows[sampled_of_part(batch, len(rows) // batch, stride, number, ranks.parts, ranks.part, device)]


def features_of(config: CacheConfig, calls: Mapping[CallPlace, BlockCall], ranks: Ranks | None) -> dict[CallPlace, Tensor]:
    """Return what is measured of blocks whose outputs are kept, by call; nothing for a policy that measures nothing."""
    found = {place: feature for place, call in calls.items() if (feature := _feature(call.outputs)) is not None}
    if not POLICIES[config.policy].measures or not found:
        return {}
    places = [list(found)[at] for at in measured_blocks(len(found), config.indicator_blocks)]
    return {place: _sample(config, found[place], number, ranks) for number, place in enumerate(places)}


class MeasuredCalls:
    """Runs every block and takes a sample of its output, where no block's output is kept."""

    def __init__(self, config: CacheConfig, ranks: Ranks | None) -> None:
        """Start before the first block."""
        self._ranks, self._config = ranks, config
        self._measures = POLICIES[config.policy].measures
        self._samples: dict[CallPlace, Tensor] = {}

    def call(self, place: CallPlace, block: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a block and return what it returned."""
        returned = block(*args, **kwargs)
        feature = _feature(pytree.tree_leaves(returned)) if self._measures else None
        if feature is not None:
            sample = _sample(self._config, feature, len(self._samples), self._ranks)
            self._samples[place] = sample.clone() if sample is feature else sample  # the model may write to it
        return returned

    def features(self) -> dict[CallPlace, Tensor]:
        """Return what is measured, by call."""
        places = list(self._samples)
        if not places:
            return {}
        return {places[at]: self._samples[places[at]] for at in measured_blocks(len(places), self._config.indicator_blocks)}
