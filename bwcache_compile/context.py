"""One stream of calls of a model or session. Needs no torch."""

from __future__ import annotations

import threading

from bwcache_compile.config import CacheConfig
from bwcache_compile.policies import POLICIES
from bwcache_compile.report import ContextReport, RawStep, step_records
from bwcache_compile.stepping import StepInfo, Tracker


class Context:
    """One stream of calls. Only the thread that holds `lock` touches it; reports read it.

    Attributes:
        name: Its name among those of all groups.
        group: The contexts that belong to the same video.
        tracker: Which step the next call is.
        created: Ordinal of its first call.
        called: Ordinal of its last call that succeeded, among those of all contexts.
        entered: When its last call began, in seconds of `time.perf_counter`.
        caller: The thread that made it.
        began: Why its generation began.
        records: What each step of its generation did.
        events: What happened besides computing and reusing.
        state_bytes: Bytes that its cache takes while a generation runs.
    """

    def __init__(self, info: StepInfo, created: int) -> None:
        """Start before the first call."""
        self.name, self.group, self.created = info.key, info.group, created
        self.lock = threading.Lock()
        self.tracker, self.called, self.entered, self.caller = Tracker(), -1, 0.0, 0
        self.began = ""
        self.records: list[RawStep] = []
        self.events: list[str] = []
        self.state_bytes = 0

    def report(self, config: CacheConfig) -> ContextReport:
        """Return the current generation as a value, with what the policy of these settings says of it."""
        steps, explain = step_records(self.records), POLICIES[config.policy].explain
        events = (*self.events, *(explain(config, steps) if explain else ()))
        return ContextReport(self.name, steps, events, self.state_bytes, self.began)
