"""The helpers of the frontier benchmark: its scores, its counts of computed steps, and how it tunes."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import data
import model as tiny
import numpy as np
import pytest
import torch
from diffusers import TaylorSeerCacheConfig
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.frontier_open_loop import anchors_of, cheapest_mask, fitted_weights
from benchmarks.frontier_protocol import Protocol, Row, Store
from benchmarks.frontier_rivals import MagCache, with_cache
from benchmarks.frontier_score import attribute_agreement, blend, nearest_drawing, paired_interval
from benchmarks.frontier_ways import Case, Indicators, PaperSchedule, Point, Way, combs, paper_schedule, taylor_schedule
from tests.reference import decide

STEPS = 5


def scores(clips: torch.Tensor, attributes: torch.Tensor) -> tuple[float, float]:
    drawings, scene = nearest_drawing(clips, attributes)
    psnr = -10 * torch.log10((drawings - clips).square().mean((1, 2, 3, 4)) / 4)
    return float(psnr.mean()), sum(attribute_agreement(clips, attributes, scene)) / len(clips)


def test_drawn_clips_agree_with_their_attributes_and_others_do_not() -> None:
    generator = torch.Generator().manual_seed(0)
    attributes = data.draw_attributes(3, generator)
    clips = data.render(attributes, generator)
    truth, agreement = scores(clips, attributes)
    assert truth > 30
    assert agreement > 0.97
    recolored = attributes.clone()
    recolored[:, 1, 1] = (recolored[:, 1, 1] + 1) % len(data.COLOURS)
    truth_recolored, agreement_recolored = scores(clips, recolored)
    assert truth_recolored < truth - 10
    assert agreement_recolored < agreement - 0.05
    for wrong in (scores(clips, attributes.roll(1, 0)), scores(tiny.draw_noise(3, 0).clamp(-1, 1), attributes)):
        assert wrong[0] < 14
        assert wrong[1] < 0.6


def test_rendering_is_drawing_a_drawn_scene() -> None:
    attributes = data.draw_attributes(3, torch.Generator().manual_seed(1))
    scene = data.draw_scene(3, torch.Generator().manual_seed(2))
    assert torch.equal(data.render(attributes, torch.Generator().manual_seed(2)), data.draw(attributes, scene))
    assert ((scene.start >= 0) & (scene.start <= 1)).all()
    assert ((scene.speed >= data.SPEEDS[0]) & (scene.speed <= data.SPEEDS[1])).all()


def test_the_paired_interval_is_students() -> None:
    ours, theirs = [3.0, 4.5, 2.0, 5.0], [2.0, 4.0, 2.5, 3.0]
    interval = paired_interval(ours, theirs)
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert interval.mean == pytest.approx(0.75)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    alone = paired_interval([1.0], [0.5])
    assert alone.mean == 0.5
    assert math.isnan(alone.low)
    assert str(paired_interval([1.0, 2.0], [1.0, 2.0])) == "+0.0 [+0.0, +0.0]"


def test_a_fraction_of_a_step_lies_between_two_plain_runs() -> None:
    assert blend(14) == [(14, 1)]
    assert blend(14.25) == [(14, 0.75), (15, 0.25)]


def test_points() -> None:
    assert Point.parse("14") == Point(14, 50)
    assert str(Point.parse("12/30")) == "12 of 30"


@pytest.mark.parametrize("trigger", [1, 4, 9, 20])
@pytest.mark.parametrize("interval", [1, 3, 5])
def test_the_papers_schedule_is_counted_as_the_oracle_does(trigger: int, interval: int) -> None:
    import bwcache_compile as bw

    config = bw.CacheConfig(threshold=0.5, reuse_interval=interval, num_steps=20)
    indicators: dict[int, float] = {}
    kept: int | None = None
    computed = 0
    for step in range(20):
        reuses, kept = decide(indicators, step, kept, config)
        if not reuses:
            computed += 1
            indicators[step] = 0.0 if step >= trigger else 1.0
    assert paper_schedule(trigger, interval, 20) == computed


def run(model: Any, steps: int) -> None:
    case = Case.of(0, 1)
    tiny.sample(model, case.tokens, case.noise, steps)


def test_taylor_combs_count_what_runs() -> None:
    settings = {"cache_interval": 3, "disable_cache_before_step": 2, "disable_cache_after_step": 4}
    running = with_cache(TaylorSeerCacheConfig(taylor_factors_dtype=torch.float32, use_lite_mode=True, **settings), STEPS)
    running.reset()
    run(running.model, STEPS)
    assert running.computed() == taylor_schedule(2, 3, 4, STEPS) == 4
    for comb in combs(Point(14), 100):
        assert 13 <= taylor_schedule(comb["disable_cache_before_step"], comb["cache_interval"], comb["disable_cache_after_step"], 50) <= 14


def test_open_loop_choices_are_the_best_of_all() -> None:
    """Against every mask, and against the normal equations solved apart."""
    outputs = torch.randn(7, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(0)
    gram, times = (outputs @ outputs.T).numpy(), np.linspace(1, 0.1, 7)

    def cost(mask: tuple[int, ...], order: int) -> float:
        total = 0.0
        for step, reused in enumerate(mask):
            computed = [other for other in range(step) if not mask[other]]
            if reused:
                last = outputs[computed[-1]]
                slope = torch.zeros_like(last)
                if order and len(computed) > 1:
                    slope = (last - outputs[computed[-2]]) / (times[computed[-1]] - times[computed[-2]])
                total += float((outputs[step] - last - slope * (times[step] - times[computed[-1]])).square().sum())
        return total

    masks = [mask for mask in itertools.product((0, 1), repeat=7) if not mask[0] and mask.count(0) == 3]
    for order in (0, 1):
        found = cheapest_mask(gram, times, 3, order)
        assert cost(found, order) == pytest.approx(min(cost(mask, order) for mask in masks), rel=1e-9)
    mask = (0, 0, 1, 0, 1, 1, 0)
    for step, row in enumerate(fitted_weights(gram, mask, 0.0)):
        if row is not None:
            anchors = anchors_of(mask, step)
            others = (outputs[anchors[1:]] - outputs[anchors[0]]).T  # weights that sum to 1 leave the first one's to the others
            best = torch.linalg.lstsq(others, (outputs[step] - outputs[anchors[0]])[:, None]).solution[:, 0].tolist()
            assert row[: len(anchors)] == pytest.approx([1 - sum(best), *best], rel=1e-6)
            assert not any(row[len(anchors) :])


def test_magcache_masks_are_what_runs() -> None:
    way = MagCache([Case.of(0, 1)])
    ratios = way._ratios(STEPS, "euler")
    assert len(ratios) == STEPS
    running = way.start({"threshold": 0.3, "max_skip_steps": 2, "retention_ratio": 1 / STEPS}, STEPS, "euler")
    running.reset()
    run(running.model, STEPS)
    mask = way.mask(ratios, 0.3, 2, 1)
    assert any(mask)
    assert running.computed() == STEPS - sum(mask)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.mm, torch.ops.aten.bmm)
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
def test_what_the_report_of_a_cached_model_calls_computed_ran() -> None:
    way = PaperSchedule("output", Indicators([]))
    settings = {"threshold": math.inf, "reuse_interval": 2}
    running = way.start(settings, STEPS, "euler")
    run(running.model, STEPS)  # captures and checks
    running.reset()
    counts = []
    for model in (running.model, tiny.load()):
        with Products() as products:
            run(model, STEPS)
        counts.append(products.count)
    # of each block: four of each attention and two of the feed-forward part; and three that prepare what only blocks read
    products_of_a_call = 12 * 10 + 3
    skipped = (counts[1] - counts[0]) / (2 * products_of_a_call)
    assert running.computed() == STEPS - skipped == paper_schedule(1, 2, STEPS)


class Stub(Way):
    """Its quality grows with what it computes, and with `good`."""

    name = "stub"
    knob = ("threshold", 0.01, 10.0)

    def settings(self, point: Point, solver: tiny.Solver) -> list[dict[str, Any]]:
        return [{"good": good} for good in (1, 3, 2)]


class Stubbed(Protocol):
    def evaluate(self, way: Way, settings: dict[str, Any], steps: int, seeds: Any, scored: bool = False) -> list[Row]:
        computed = max(1.0, steps / (1 + 4 * settings["threshold"]))
        return [{"seed": seed, "computed": computed, "psnr": computed + settings["good"]} for seed in seeds]


def test_tuning_takes_the_best_setting_that_stays_within_the_point() -> None:
    protocol = Stubbed("euler", 1, [1, 2], [3], Store(None))
    tuned = protocol.tune(Stub(), Point(10))
    assert tuned is not None
    assert tuned.settings["good"] == 3
    assert 9 < tuned.computed <= 10.25
    assert protocol.tune(Stub(), Point(0)) is None


def test_a_store_goes_on_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "store.jsonl"
    Store(path).put("a", {"psnr": 1.5})
    assert Store(path).get("a") == {"psnr": 1.5}
    assert Store(path).get("b") is None
