"""Calibration: which steps of a generation to compute, and how to combine the last computed ones at the others."""

from bwcache_compile.calibration.cut_model import CutModel, OutputCut, OutputState
from bwcache_compile.calibration.plan import CalibrationPlan, PlanEntry, Provenance
from bwcache_compile.calibration.procedure import calibrate

__all__ = ["CalibrationPlan", "CutModel", "OutputCut", "OutputState", "PlanEntry", "Provenance", "calibrate"]
