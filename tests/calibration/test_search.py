"""The search spends what it may, decides by what it ran, and refines by moves of single steps."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from bwcache_compile.calibration.evaluate import Candidate
from bwcache_compile.calibration.masks import Mask, dense_ends, mask_text, moves
from bwcache_compile.calibration.sampler_map import SamplerMap
from bwcache_compile.calibration.search import FAMILIES, Search, _promising

STEPS = 20
KNOWN = SamplerMap(0, ({},) * STEPS, (0.0,) * STEPS, True)
UNKNOWN = dataclasses.replace(KNOWN, residuals=(0.5,) * STEPS, explained=False)


class Scripted:
    """Evaluates masks by a formula."""

    def __init__(self, best: Mask, favorite: str = "fitted") -> None:
        self.best, self.favorite = best, favorite
        self.cost, self.steps, self.full = 1.3, STEPS, []
        self.ran: list[tuple[str, str]] = []

    def candidate(self, mask: Mask, rule: Any, name: str) -> Candidate:
        self.cost += sum(mask) / STEPS
        self.ran.append((mask_text(mask), name))
        wrong = sum(a != b for a, b in zip(mask, self.best, strict=True))
        return Candidate(mask, (), 40.0 - wrong - 5 * (name != self.favorite), name)


def search(evaluator: Scripted, sampler: SamplerMap | None, limit: float) -> Search:
    return Search(evaluator, sampler, limit)  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [2.0, 4.0, 10.0])
def test_the_limit_holds_and_nothing_is_run_twice(limit: float) -> None:
    evaluator = Scripted(dense_ends(8, STEPS, 1.7))
    found = search(evaluator, KNOWN, limit).run([8, 4])
    assert set(found) == {8, 4}
    assert evaluator.cost <= limit + 1e-6
    assert len(set(evaluator.ran)) == len(evaluator.ran)


def test_the_best_family_is_found() -> None:
    best = FAMILIES[3].mask(8, STEPS)
    assert search(Scripted(best), KNOWN, 5.0).run([8])[8].mask == best


def test_moves_refine_what_no_family_holds() -> None:
    best = moves(moves(FAMILIES[1].mask(8, STEPS))[-1])[0]
    evaluator = Scripted(best)
    assert best not in [family.mask(8, STEPS) for family in FAMILIES]
    assert search(evaluator, KNOWN, 20.0).run([8])[8].mask == best


def test_every_budget_is_run_once_whatever_the_limit() -> None:
    evaluator = Scripted(dense_ends(8, STEPS))
    assert set(search(evaluator, KNOWN, 1.0).run([12, 8, 4])) == {12, 8, 4}
    assert len(evaluator.ran) == 3


def test_the_rule_is_chosen_at_the_least_budget() -> None:
    evaluator = Scripted(dense_ends(4, STEPS), favorite="damped")
    found = search(evaluator, UNKNOWN, 4.0).run([8, 4])
    assert {candidate.rule for candidate in found.values()} == {"damped"}
    first = evaluator.ran[:5]
    assert {mask for mask, _ in first} == {mask_text(dense_ends(4, STEPS))}
    assert {rule for _, rule in first} == {"fitted", "outputs", "linear", "hold", "damped"}
    assert {rule for _, rule in evaluator.ran[5:]} == {"damped"}


def test_without_latents_there_are_fixed_rules_alone() -> None:
    evaluator = Scripted(dense_ends(4, STEPS), favorite="hold")
    assert search(evaluator, None, 4.0).run([4])[4].rule == "hold"
    assert {rule for _, rule in evaluator.ran} == {"linear", "hold", "damped"}


def test_moves_into_the_gap_with_the_largest_drift_come_first() -> None:
    mask = tuple(step in (0, 4, 8, 12) for step in range(13))
    drift = tuple(torch.tensor([0, 0, 0, 0, 0, 1, 2, 3, 4, 4, 4, 4, 4]).double().tolist())
    moved = _promising(Candidate(mask, (), 30.0, "fitted", drift))
    assert len(moved) == 4
    assert {mask_text(m) for m in moved[:2]} == {"#....#..#...#", "#...#..#....#"}
