"""diffusers' caches as ways of the frontier benchmark, on the same weights.

Each is tuned over a grid of its own settings; one with a threshold has it solved for the number of computed steps.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import io
from typing import Any

import model as tiny
import numpy as np
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from torch import Tensor

from benchmarks.frontier_ways import MOST_SETTINGS, SLACK, BlockWork, Case, Point, Running, Settings, Way, combs

try:
    from diffusers import SeaCacheConfig
except ImportError:
    SeaCacheConfig = None

ALL_PARTS = r"blocks\.\d+\.(attn1|attn2|ffn)"
WHOLE_BLOCKS = r"blocks\.\d+"


def with_cache(config: Any, steps: int) -> Running:
    """Run the model under one of diffusers' caches."""
    model = tiny.load()
    work = BlockWork(model)
    model.enable_cache(config)

    def reset() -> None:
        work.reset()
        model._reset_stateful_cache()

    return Running(model, steps, reset, work.computed)


class FirstBlockCache(Way):
    """Reuses the later blocks' residual while the first block's hardly changes."""

    name = "FirstBlockCache"
    alone = True
    knob = ("threshold", 0.005, 3.0)

    def settings(self, point: Point, solver: tiny.Solver) -> list[Settings]:
        """The threshold is all there is."""
        return [{}]

    def start(self, settings: Settings, steps: int, solver: tiny.Solver) -> Running:
        """Enable it."""
        return with_cache(FirstBlockCacheConfig(**settings), steps)


class MagCache(Way):
    """Reuses residuals while the calibrated ratios of their magnitudes promise a small error."""

    name = "MagCache"

    def __init__(self, tuning: list[Case]) -> None:
        self._tuning = tuning
        self._ratios = functools.cache(self._calibrate)

    def _calibrate(self, steps: int, solver: tiny.Solver) -> tuple[float, ...]:
        """Run diffusers' own calibration on the tuning cases: it prints one list per context, of which the mean is taken."""
        running = with_cache(MagCacheConfig(calibrate=True, num_inference_steps=steps), steps)
        tokens, noise = (torch.cat([getattr(case, name) for case in self._tuning]) for name in ("tokens", "noise"))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            tiny.sample(running.model, tokens, noise, steps, solver=solver)
        lists = [ast.literal_eval(line) for line in printed.getvalue().splitlines() if line.startswith("[1")]
        if not lists or {len(found) for found in lists} != {steps}:
            raise RuntimeError(f"MagCache's calibration printed no list of {steps} ratios")
        return tuple(np.mean(lists, 0).tolist())

    @staticmethod
    def mask(ratios: tuple[float, ...], threshold: float, most: int, retained: int) -> tuple[bool, ...]:
        """Return which steps it reuses; it looks at the ratios alone."""
        mask, ratio, error, skipped = [], 1.0, 0.0, 0
        for step, factor in enumerate(ratios):
            reuses = False
            if step >= retained:
                ratio, skipped = ratio * factor, skipped + 1
                error += abs(1 - ratio)
                reuses = step > 0 and error <= threshold and skipped <= most
                if not reuses:
                    ratio, error, skipped = 1.0, 0.0, 0
            mask.append(reuses)
        return tuple(mask)

    def settings(self, point: Point, solver: tiny.Solver) -> list[Settings]:
        """Try most steps in a row and retained starts, with the least threshold that computes the point's steps."""
        ratios, found = self._ratios(point.steps, solver), {}
        for most in (1, 2, 3, 4, 5, 7, 10):
            for retained in (1, 4, 8):
                for threshold in np.geomspace(1e-3, 10, 200).tolist():
                    mask = self.mask(ratios, threshold, most, retained)
                    if point.steps - sum(mask) <= point.computed:
                        if point.steps - sum(mask) >= point.computed - 1:
                            setting = {"threshold": threshold, "max_skip_steps": most, "retention_ratio": retained / point.steps}
                            found.setdefault(mask, setting)
                        break
        return list(found.values())[:MOST_SETTINGS]

    def start(self, settings: Settings, steps: int, solver: tiny.Solver) -> Running:
        """Enable it with the calibrated ratios."""
        return with_cache(MagCacheConfig(mag_ratios=list(self._ratios(steps, solver)), num_inference_steps=steps, **settings), steps)


class TaylorSeer(Way):
    """Forecasts the outputs of modules on a comb of steps.

    By default it hooks nothing in this model, so the modules are named: every attention and feed-forward part, as in its
    paper, or every block.
    """

    name = "TaylorSeer"

    def settings(self, point: Point, solver: tiny.Solver) -> list[Settings]:
        """Try combs, orders and what is forecast."""
        forecast = ((1, ALL_PARTS), (2, ALL_PARTS), (1, WHOLE_BLOCKS))
        return [
            {**comb, "max_order": order, "cache_identifiers": [modules]}
            for comb in combs(point, MOST_SETTINGS // len(forecast))
            for order, modules in forecast
        ]

    def start(self, settings: Settings, steps: int, solver: tiny.Solver) -> Running:
        """Enable it with factors in float32."""
        return with_cache(TaylorSeerCacheConfig(taylor_factors_dtype=torch.float32, **settings), steps)


class TaylorSeerLite(Way):
    """Forecasts the model's output to first order on a comb of steps, as OpenVINO GenAI does: diffusers' lite mode."""

    name = "TaylorSeer Lite"

    def settings(self, point: Point, solver: tiny.Solver) -> list[Settings]:
        """Try combs."""
        return combs(point, MOST_SETTINGS)

    def start(self, settings: Settings, steps: int, solver: tiny.Solver) -> Running:
        """Enable it with factors in float32."""
        return with_cache(TaylorSeerCacheConfig(taylor_factors_dtype=torch.float32, use_lite_mode=True, **settings), steps)


def colors(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the latents among the model's input channels; the others are coordinates."""
    return list((args[0] if args else kwargs["hidden_states"])[:, :3].unbind(0))


class SeaCache(Way):
    """Reuses residuals while the filtered latents hardly change."""

    name = "SeaCache"
    alone = True
    knob = ("threshold", 0.005, 10.0)

    def settings(self, point: Point, solver: tiny.Solver) -> list[Settings]:
        """Try orders, most steps in a row (0: no limit) and protected ends; combs that cannot reach the point are left out."""
        grid = [
            {"residual_order": order, "max_consecutive_cached": most, "cache_end_steps": end}
            for order in (0, 1)
            for most, end in ((2, 1), (3, 1), (5, 1), (0, 1), (5, 4))
        ]
        return [
            s for s in grid if not s["max_consecutive_cached"] or point.steps / (s["max_consecutive_cached"] + 1) < point.computed + SLACK
        ]

    def start(self, settings: Settings, steps: int, solver: tiny.Solver) -> Running:
        """Enable it; the latents are named, as this model has channels of coordinates besides."""
        return with_cache(SeaCacheConfig(raw_vision_callback=colors, **settings), steps)


def rivals(tuning: list[Case]) -> list[Way]:
    """Return diffusers' caches that this version has."""
    found: list[Way] = [TaylorSeerLite(), MagCache(tuning), FirstBlockCache(), TaylorSeer()]
    return found if SeaCacheConfig is None else [*found, SeaCache()]
