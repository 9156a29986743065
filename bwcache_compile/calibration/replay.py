"""Run a model by an entry of a plan."""

from __future__ import annotations

from torch import nn

from bwcache_compile.calibration.cut_model import CutModel, OutputCut
from bwcache_compile.calibration.generation import Generation, StandIn, table_rule
from bwcache_compile.calibration.plan import CalibrationPlan, PlanEntry
from bwcache_compile.calibration.recording import Recorder


def replay(model: nn.Module | CutModel, plan: CalibrationPlan, entry: PlanEntry) -> nn.Module:
    """Return a stand-in for a model that runs one generation by an entry of a plan.

    Args:
        model: What the plan was made for.
        plan: Says which call belongs to which step.
        entry: From `plan.at`.

    Raises:
        StateError: The plan was made for another model. Calls that it does not have, or at other times, are refused as they come.
    """
    cut = OutputCut(model, plan.anchors) if isinstance(model, nn.Module) else model
    plan.check_model(cut.module)

    def check(recorder: Recorder) -> None:
        plan.check_time(recorder.step, recorder.steps[-1].times.values())

    return StandIn(Generation(cut, Recorder(schedule=plan.provenance.calls), entry.mask, table_rule(entry.weights), check))
