"""Record what the indicator shows where a plan runs as it was calibrated: beyond that, a guarded plan computes more steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from bwcache_compile.calibration.evaluate import Generate, generated
from bwcache_compile.calibration.plan import CalibrationPlan
from bwcache_compile.errors import ConfigError
from bwcache_compile.report import ContextReport
from bwcache_compile.runtime.drop_in import DropIn


def with_indicators(plan: CalibrationPlan, cached: DropIn, generate: Generate) -> CalibrationPlan:
    """Return a plan whose entries hold the indicator at each computed step, from one generation each by the settings of the entry.

    Args:
        plan: The entries without indicators.
        cached: What `transform` returned for the model; its own settings and contexts are not touched.
        generate: See `calibrate`.

    Raises:
        ConfigError: The settings do not fit the guard, or `generate` did not run the steps of the plan.
    """
    entries = []
    model: DropIn | None = None
    try:
        for entry in plan.entries:
            settings = plan.settings(dataclasses.replace(entry, indicators=(None,) * plan.steps), guarded=True)
            if model is None:
                model = cached.with_settings(settings)
            generated(model, settings, generate)
            found = _indicators(plan, list(model.report().contexts.values()))
            entries.append(dataclasses.replace(entry, indicators=found))
    finally:
        if model is not None:
            model.close()
    return dataclasses.replace(plan, entries=tuple(entries))


def _indicators(plan: CalibrationPlan, contexts: Sequence[ContextReport]) -> tuple[float | None, ...]:
    """Return the mean of the contexts' indicators at each step of the model; None where nothing was measured."""
    found: list[float | None] = []
    for step in plan.provenance.step_indices:
        values = [record.indicator for context in contexts for record in context.steps if record.step == step]
        known = [value for value in values if value is not None and math.isfinite(value)]
        found.append(sum(known) / len(known) if known else None)
    if not any(value is not None for value in found):
        raise ConfigError(
            "generate did not run the cached model that it was given, so no indicator was measured for guarded=True. Call its argument each"
            " time: `generate=lambda model: ...`."
        )
    return tuple(found)
