"""Calibration: which steps of a generation to compute, and how to combine the last computed ones at the others."""

from bwcache_compile.calibration.cut_model import CutModel, OutputCut, OutputState
from bwcache_compile.calibration.plan import CalibrationPlan, Provenance
from bwcache_compile.calibration.plan_entry import PlanEntry
from bwcache_compile.calibration.procedure import calibrate
from bwcache_compile.calibration.verification import verify_plan

__all__ = ["CalibrationPlan", "CutModel", "OutputCut", "OutputState", "PlanEntry", "Provenance", "calibrate", "verify_plan"]
