"""Run a model by an entry of a plan."""

from __future__ import annotations

from torch import nn

from bwcache_compile.calibration.cut_model import CutModel, OutputCut
from bwcache_compile.calibration.generation import Generation, StandIn, table_rule
from bwcache_compile.calibration.plan import PlanEntry
from bwcache_compile.calibration.recording import Recorder


def replay(model: nn.Module | CutModel, entry: PlanEntry) -> nn.Module:
    """Return a stand-in for a model that runs one generation by an entry of a plan.

    Args:
        model: What the plan was made for.
        entry: From `CalibrationPlan.at`.
    """
    cut = OutputCut(model, len(entry.weights[0])) if isinstance(model, nn.Module) else model
    return StandIn(Generation(cut, Recorder(), entry.mask, table_rule(entry.weights)))
