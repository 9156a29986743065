"""cache-dit's DBCache and its step masks as ways of the frontier benchmark.

cache-dit is no dependency of this project; the recorded figures are those of version 1.5.3:

    pip install --no-deps cache-dit==1.5.3

At least the first block runs at every step, which counts as computed.
"""

from __future__ import annotations

import importlib.util
import logging

import model as tiny

from benchmarks.frontier_ways import SLACK, BlockWork, Point, Running, Settings, Way

BLOCKS = 12


def installed() -> bool:
    """Return whether cache-dit is there."""
    return importlib.util.find_spec("cache_dit") is not None


def with_cache_dit(settings: Settings, steps: int) -> Running:
    """Run the model under cache-dit; the calls of the two contexts alternate."""
    import cache_dit as library

    for name in list(logging.root.manager.loggerDict):
        if name.lower().startswith("cache_dit") or name.lower() == "cache-dit":
            logging.getLogger(name).setLevel(logging.ERROR)
    model = tiny.load()
    work = BlockWork(model)
    values = dict(settings)
    order = values.pop("taylor_order", 0)
    config = library.DBCacheConfig(Bn_compute_blocks=0, num_inference_steps=steps, enable_separate_cfg=True, **values)
    library.enable_cache(
        model, cache_config=config, calibrator_config=library.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
    )

    def reset() -> None:
        work.reset()
        library.refresh_context(model, num_inference_steps=steps)

    return Running(model, steps, reset, work.computed)


class DBCache(Way):
    """Reuses the middle blocks' residual while that of the first blocks hardly changes."""

    alone = True
    knob = ("residual_diff_threshold", 0.002, 3.0)

    def __init__(self, taylor: bool) -> None:
        self.name = "cache-dit DBCache, TaylorSeer" if taylor else "cache-dit DBCache"
        self._orders = (1, 2) if taylor else (0,)

    def settings(self, point: Point, solver: tiny.Solver) -> list[Settings]:
        """Try first blocks, warm-ups, most steps in a row and orders; what cannot compute so few steps is left out."""
        grid = [
            {"Fn_compute_blocks": first, "max_warmup_steps": warmup, "max_continuous_cached_steps": most, "taylor_order": order}
            for first in (1, 4)
            for warmup, most in ((2, -1), (4, 3), (8, -1))
            for order in self._orders
        ]

        def least(s: Settings) -> float:
            reused = (point.steps - s["max_warmup_steps"]) * (1 if s["max_continuous_cached_steps"] < 0 else 3 / 4)
            return point.steps - reused * (1 - s["Fn_compute_blocks"] / BLOCKS)

        return [setting for setting in grid if least(setting) <= point.computed + SLACK]

    def start(self, settings: Settings, steps: int, solver: tiny.Solver) -> Running:
        """Enable it."""
        return with_cache_dit(settings, steps)


class StepMasks(Way):
    """Computes the steps of a mask and reuses the residual at all others, with or without TaylorSeer."""

    name = "cache-dit step masks"

    def settings(self, point: Point, solver: tiny.Solver) -> list[Settings]:
        """Try warm-ups and protected ends with even combs between them, and orders."""
        full = int((point.computed + SLACK - point.steps / BLOCKS) / (1 - 1 / BLOCKS))
        found = []
        for warmup, end in ((1, 1), (2, 1), (4, 1), (2, 3), (4, 3)):
            between = full - warmup - end
            if between < 1:
                continue
            stride = (point.steps - warmup - end + 1) / (between + 1)
            computed = {
                *range(warmup),
                *range(point.steps - end, point.steps),
                *(warmup - 1 + round(i * stride) for i in range(1, between + 1)),
            }
            mask = [int(step in computed) for step in range(point.steps)]
            found += [{"steps_computation_mask": mask, "taylor_order": order} for order in (0, 1, 2)]
        return found

    def start(self, settings: Settings, steps: int, solver: tiny.Solver) -> Running:
        """Enable it with one block at every step, the fewest that it allows."""
        fixed = {
            "Fn_compute_blocks": 1,
            "max_warmup_steps": 1,
            "steps_computation_policy": "static",
            "residual_diff_threshold": 1e9,
        }
        return with_cache_dit({**fixed, **settings}, steps)
