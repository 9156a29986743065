"""The settings that a command line asks for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bwcache_compile.calibration import CalibrationPlan
from bwcache_compile.cli.outcome import UsageError
from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import ConfigError


def _value(text: str) -> Any:
    """Read a value: JSON, `inf`, or text as it stands."""
    try:
        return json.loads(text)
    except ValueError:
        return float(text) if text in ("inf", "nan") else text


def settings(pairs: Sequence[str] | None, plan: Path | None, at: float | None) -> CacheConfig | None:
    """Return the settings; None where nothing was asked for, which leaves the choice to `transform`.

    Raises:
        UsageError: A setting has no such name or value, the plan cannot be read, or `at` has no plan.
    """
    if at is not None and plan is None:
        raise UsageError("--at requires --plan")
    if not pairs and plan is None:
        return None
    changes = {}
    for pair in pairs or ():
        name, equals, text = pair.partition("=")
        if not equals:
            raise UsageError(f"--set {pair}: expected NAME=VALUE, such as --set threshold=0.1")
        changes[name] = _value(text)
    read = read_plan(plan)
    try:
        config = None if read is None else read.at(read.entries[0].budget if at is None else at)
        return CacheConfig.of(config, **changes)
    except (ConfigError, TypeError) as error:
        raise UsageError(" ".join(str(error).split())) from error


def read_plan(path: Path | None) -> CalibrationPlan | None:
    """Return the plan of a file; None without one.

    Raises:
        UsageError: It cannot be read, or is no plan.
    """
    if path is None:
        return None
    try:
        return CalibrationPlan.load(path)
    except OSError as error:
        raise UsageError(f"cannot read the plan {path}: {error.strerror}") from error
    except ConfigError as error:
        raise UsageError(" ".join(str(error).split())) from error
