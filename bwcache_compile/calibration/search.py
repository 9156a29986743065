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
        head: Leading computed steps before an even spacing; 0 for dense ends.
    """

    start: float = 1.5
    end: float = 1.5
    head: int = 0

    def mask(self, count: int, steps: int) -> Mask:
        """Place `count` computed steps."""
        if self.head:
            return masks.head_and_comb(count, steps, self.head)
        return masks.dense_ends(count, steps, self.start, self.end)


FAMILIES = (Family(1.5, 1.5), Family(1.3, 1.3), Family(head=4), Family(1.7, 1.7), Family(1.5, 1.2), Family(1.2, 1.5), Family(1.0, 1.0))
"""In the order in which they are tried."""


class Search:
    """Looks for the best mask of each budget within a limit on model calls."""

    def __init__(self, evaluator: Evaluator, sampler: SamplerMap | None, limit: float) -> None:
        """Search with fitted weights, or with fixed rules where the sampler's steps are not known.

        Args:
            evaluator: Runs generations.
            sampler: The sampler's steps.
            limit: In full generations, what was spent before included.
        """
        self._evaluator, self._limit = evaluator, limit
        fitted = {} if sampler is None else {"fitted": DriftCorrection(evaluator.full, sampler)}
        self._rules: dict[str, Rule] = {**fitted} if fitted else {name: fixed_rule(name) for name in ("linear", "hold", "damped")}
        self._best: dict[int, Candidate] = {}
        self._tried: set[tuple[Mask, str]] = set()

    def affordable(self, mask: Mask) -> bool:
        """Return whether one more generation with this mask stays within the limit."""
        return self._evaluator.cost + sum(mask) / len(mask) <= self._limit + 1e-9

    def _try(self, mask: Mask, rule: str) -> bool:
        """Run a mask; return whether it is the best of its budget so far."""
        if (mask, rule) in self._tried or not self.affordable(mask):
            return False
        self._tried.add((mask, rule))
        candidate, _ = self._evaluator.candidate(mask, self._rules[rule], rule)
        count = sum(mask)
        if count in self._best and self._best[count].psnr >= candidate.psnr:
            return False
        self._best[count] = candidate
        return True

    def run(self, counts: list[int]) -> dict[int, Candidate]:
        """Return the best candidate for each number of computed steps."""
        steps = self._evaluator.steps
        for count in counts:  # every budget gets one run whatever the limit
            mask, rule = FAMILIES[0].mask(count, steps), next(iter(self._rules))
            self._tried.add((mask, rule))
            self._best[count] = self._evaluator.candidate(mask, self._rules[rule], rule)[0]
        for family in FAMILIES:
            for count in counts:
                for rule in self._rules:
                    self._try(family.mask(count, steps), rule)
        return self._best
