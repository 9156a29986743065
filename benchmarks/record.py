"""Writing down what a benchmark measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_record(path: Path, record: Any) -> None:
    """Write a record as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    temporary.replace(path)
