"""A cut model whose steps are those of a cached model's graphs: anchors at the blocks' output or at the model's."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import ConfigError
from bwcache_compile.graph_settings import Cut
from bwcache_compile.runtime.cached_model import CachedModel
from bwcache_compile.runtime.state import CacheState
from bwcache_compile.stepping import Cursor


class GraphCut:
    """Runs the compute and reuse graphs of a cached model, on states that calibration owns.

    Steps are counted in computed calls, so that the table of weights has one row, which always applies.
    """

    def __init__(self, cached: CachedModel, anchors: int = 4, cut: Cut = "blocks") -> None:
        """Make graphs for `anchors` anchors at `cut`; they are captured at the first call.

        Raises:
            ConfigError: The guard is in the graph.
        """
        if cached.guard != "host":
            raise ConfigError(
                f"cut='blocks' requires guard='host', because calibration chooses the graph of each step; the model has"
                f" guard={cached.guard!r}."
            )
        config = CacheConfig(policy="static", steps_mask=(0,), reuse="linear", anchors=anchors, cut=cut)
        self._cached = cached.with_settings(config)
        self.module: nn.Module = cached.original
        self.anchors, self.reads_inputs = anchors, cut == "blocks"

    def fresh(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CacheState:
        """Return a state without anchors."""
        state = self._cached.init_state(args, kwargs)
        assert isinstance(state, CacheState), "the guard is on the host"
        return state

    def compute(self, args: tuple[Any, ...], kwargs: dict[str, Any], state: CacheState) -> tuple[Any, CacheState]:
        """Run the model's graph; the state afterwards has this step as its newest anchor."""
        step = state.cursor.computed_at + 1
        output, following = self._cached.functional_step(args, kwargs, dataclasses.replace(state, cursor=Cursor(step, step - 1)))
        assert isinstance(following, CacheState), "the guard is on the host"
        return output, following

    def reuse(self, args: tuple[Any, ...], kwargs: dict[str, Any], state: CacheState, weights: Tensor) -> Any:
        """Run the graph of a reused step with these weights of the anchors."""
        last = state.cursor.computed_at
        anchors = [float(max(step, -1)) for step in range(last, last - self.anchors, -1)]
        given = {"weights": weights.reshape(1, -1).float(), "anchor_steps": torch.tensor([anchors])}
        config = self._cached.cache_config
        parameters = tuple(
            given[parameter.name].to(value.device) if parameter.name in given else value
            for parameter, value in zip(config.graph_settings.parameters, self._cached.policy_parameters(), strict=True)
        )
        state = dataclasses.replace(state, cursor=Cursor(last + 1, last, last + 1))
        return self._cached.functional_step(args, kwargs, state, parameters)[0]
