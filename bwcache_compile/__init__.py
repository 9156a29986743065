"""Block caching for diffusion transformers, done in the graph.

Names are imported when they are first asked for: what runs an exported bundle (`load`) needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import (
    BundleError,
    CacheWarning,
    CaptureError,
    ConfigError,
    ExportError,
    InvariantError,
    NoBlocksFoundError,
    StateError,
    UnsupportedGraphError,
)

if TYPE_CHECKING:
    from bwcache_compile.api import find_blocks, transform
    from bwcache_compile.api_export import export
    from bwcache_compile.bundle.add_weights import add_weights
    from bwcache_compile.bundle.load import load
    from bwcache_compile.bundle.manifest import Manifest
    from bwcache_compile.bundle.session import Session
    from bwcache_compile.calibration import CalibrationPlan, calibrate, verify_plan
    from bwcache_compile.html_report import write_node_data, write_report
    from bwcache_compile.ir.graph_text import graph_diff
    from bwcache_compile.ir.plan import BlockSearch, CachePlan
    from bwcache_compile.opaque import OpaqueModel
    from bwcache_compile.pipelines import CapturedCall, capture_call, disable, enable
    from bwcache_compile.region import RegionModel
    from bwcache_compile.report import Report
    from bwcache_compile.runtime import CachedModel, CacheState, GuardedState, RowState, RowStore
    from bwcache_compile.step_events import StepEvent
    from bwcache_compile.step_trace import trace_steps

__version__ = "0.1.0"

_HOMES = {
    "BlockSearch": "ir.plan",
    "CachePlan": "ir.plan",
    "CalibrationPlan": "calibration",
    "CacheState": "runtime",
    "CachedModel": "runtime",
    "CapturedCall": "pipelines",
    "GuardedState": "runtime",
    "OpaqueModel": "opaque",
    "RegionModel": "region",
    "add_weights": "bundle.add_weights",
    "calibrate": "calibration",
    "capture_call": "pipelines",
    "disable": "pipelines",
    "enable": "pipelines",
    "export": "api_export",
    "find_blocks": "api",
    "graph_diff": "ir.graph_text",
    "Manifest": "bundle.manifest",
    "Report": "report",
    "RowState": "runtime",
    "RowStore": "runtime",
    "Session": "bundle.session",
    "StepEvent": "step_events",
    "load": "bundle.load",
    "trace_steps": "step_trace",
    "transform": "api",
    "verify_plan": "calibration",
    "write_node_data": "html_report",
    "write_report": "html_report",
}

__all__ = [
    "BlockSearch",
    "BundleError",
    "CacheConfig",
    "CachePlan",
    "CacheState",
    "CacheWarning",
    "CachedModel",
    "CalibrationPlan",
    "CaptureError",
    "CapturedCall",
    "ConfigError",
    "ExportError",
    "GuardedState",
    "InvariantError",
    "Manifest",
    "NoBlocksFoundError",
    "OpaqueModel",
    "RegionModel",
    "Report",
    "RowState",
    "RowStore",
    "Session",
    "StateError",
    "StepEvent",
    "UnsupportedGraphError",
    "add_weights",
    "calibrate",
    "capture_call",
    "disable",
    "enable",
    "export",
    "find_blocks",
    "graph_diff",
    "load",
    "trace_steps",
    "transform",
    "verify_plan",
    "write_node_data",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(f'bwcache_compile.{name} needs torch: pip install "bwcache-compile[torch]".') from error
    value = globals()[name] = getattr(module, name)
    return value
