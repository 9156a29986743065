"""Running cached programs: state, contexts, reports."""

from bwcache_compile.report import ContextReport, Report, StepRecord
from bwcache_compile.runtime.cached_model import CachedModel
from bwcache_compile.runtime.row_state import RowState, RowStore
from bwcache_compile.runtime.state import CacheState, GuardedState
from bwcache_compile.runtime.trial import Toolchain

__all__ = ["CacheState", "CachedModel", "ContextReport", "GuardedState", "Report", "RowState", "RowStore", "StepRecord", "Toolchain"]
