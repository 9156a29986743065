"""Choose masks by running them: successive halving over a small family, then moves of single steps."""

from __future__ import annotations

import dataclasses

from bwcache_compile.calibration import masks
from bwcache_compile.calibration.evaluate import Candidate, Evaluator, fixed_rule
from bwcache_compile.calibration.fit import DriftCorrection
from bwcache_compile.calibration.generation import Rule
from bwcache_compile.calibration.masks import Mask
from bwcache_compile.calibration.sampler_map import SamplerMap


@dataclasses.dataclass(frozen=True)
class Family:
    """A way of placing any number of computed steps.

    Attributes:
        start: Exponent of the spacing in the first half, see `masks.dense_ends`.
        end: The same for the second half.
        head: Share of the computed steps that lead, before an even spacing, as in the paper's schedule; 0 for dense ends.
    """

    start: float = 1.5
    end: float = 1.5
    head: float = 0.0

    def mask(self, count: int, steps: int) -> Mask:
        """Place `count` computed steps."""
        if self.head:
            return masks.head_and_comb(count, steps, round(self.head * count))
        return masks.dense_ends(count, steps, self.start, self.end)


FAMILIES = (Family(1.5, 1.5), Family(1.3, 1.3), Family(head=0.4), Family(1.7, 1.7), Family(1.5, 1.2), Family(1.2, 1.5), Family(1.0, 1.0))
"""In the order in which they are tried."""


_NOISY = 0.3
"""Residual above which fitted weights are compared with the linear rule, although rounding explains it."""
_LEAST_GAIN = 0.2
"""A move must gain this many dB: less is the prompt's own."""


class Search:
    """Looks for the best mask of each budget within a limit on model calls."""

    def __init__(self, evaluator: Evaluator, sampler: SamplerMap | None, limit: float) -> None:
        """Search with fitted weights, and compare them with fixed rules where the sampler's steps are not known for sure.

        Args:
            evaluator: Runs generations.
            sampler: The sampler's steps, as far as they were recovered; None where the latents were not found.
            limit: In full generations, what was spent before included.
        """
        self._evaluator, self._limit = evaluator, limit
        self._rules: dict[str, Rule] = {}
        if sampler is not None:
            self._rules["fitted"] = DriftCorrection(evaluator.full, sampler)
            if sampler.residual > _NOISY:
                self._rules["linear"] = fixed_rule("linear")
        if sampler is None or not sampler.explained:
            self._rules |= {name: fixed_rule(name) for name in ("linear", "hold", "damped")}
        if sampler is not None and not sampler.explained:
            self._rules["outputs"] = DriftCorrection(evaluator.full, None)
        self._best: dict[int, Candidate] = {}
        self._tried: set[tuple[Mask, str]] = set()

    def run(self, counts: list[int]) -> dict[int, Candidate]:
        """Return the best candidate for each number of computed steps."""
        steps = self._evaluator.steps
        rule = self._best_rule(min(counts))
        for count in counts:  # every budget gets one run whatever the limit
            if count not in self._best:
                self._try(FAMILIES[0].mask(count, steps), rule, free=True)
        for family in FAMILIES[1:]:
            for count in counts:
                self._try(family.mask(count, steps), rule)
        while any([self._refine(count, rule) for count in counts]):
            pass
        return self._best

    def _best_rule(self, count: int) -> str:
        """Return the rule that is best at a number of computed steps."""
        if len(self._rules) > 1:
            for rule in self._rules:
                self._try(FAMILIES[0].mask(count, self._evaluator.steps), rule, free=count not in self._best)
            return self._best[count].rule
        return next(iter(self._rules))

    def _try(self, mask: Mask, rule: str, gain: float = 0.0, free: bool = False) -> bool:
        """Run a mask once, if the limit allows it or it is free; return whether it is the best of its budget so far."""
        affordable = self._evaluator.cost + sum(mask) / len(mask) <= self._limit + 1e-9
        if (mask, rule) in self._tried or not (affordable or free):
            return False
        self._tried.add((mask, rule))
        candidate = self._evaluator.candidate(mask, self._rules[rule], rule)
        count = sum(mask)
        if count in self._best and candidate.psnr <= self._best[count].psnr + gain:
            return False
        self._best[count] = candidate
        return True

    def _refine(self, count: int, rule: str) -> bool:
        """Run the most promising move of one step that was not run yet; return whether it was the limit that did not forbid it."""
        before = len(self._tried)
        for mask in _promising(self._best[count]):
            if (mask, rule) not in self._tried:
                self._try(mask, rule, gain=_LEAST_GAIN)
                break
        return len(self._tried) > before


def _promising(candidate: Candidate) -> list[Mask]:
    """Return the moves of one computed step by one, those first that shorten a gap over which the drift grows."""
    mask, drift = candidate.mask, candidate.drift
    found = masks.moves(mask)
    if not drift:
        return found

    def growth(step: int) -> float:
        """Return how much the drift grows over the gap that a reused step is in."""
        first = max(i for i in range(step + 1) if mask[i])
        last = min(i for i in range(step, len(mask)) if mask[i])
        return drift[last] - drift[first]

    def promise(moved: Mask) -> float:
        gained = next(i for i in range(len(mask)) if moved[i] and not mask[i])
        lost = next(i for i in range(len(mask)) if mask[i] and not moved[i])
        behind = 2 * lost - gained
        return growth(gained) - (growth(behind) if not mask[behind] else 0.0)

    return sorted(found, key=promise, reverse=True)
