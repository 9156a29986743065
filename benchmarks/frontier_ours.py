"""The calibrated way of this package, offered by the frontier benchmark where the package has `calibrate`."""

from __future__ import annotations

import model as tiny

from benchmarks.frontier_ways import Case, Way


def calibrated(computed: int, solver: tiny.Solver, *, steps: int, tuning: list[Case]) -> Way:
    """Return a way that runs a plan with `computed` of `steps` steps.

    Args:
        computed: Steps to compute.
        solver: The solver of `tiny.sample`.
        steps: Steps of one generation.
        tuning: The cases to calibrate on; the test cases are not for this.

    Raises:
        NotImplementedError: Always, until it is written with `bwcache_compile.calibrate`.
    """
    raise NotImplementedError("frontier_ours.calibrated is not written yet")
