"""Lets diffusers' pipelines be imported where transformers is not installed."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).with_name("stand_ins")))  # behind everything installed: a real package wins
