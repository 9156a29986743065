"""One bundle with every size open, for the tests that only need a bundle."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import bwcache_compile as bw
from tests.models import OneStream, noise


@dataclasses.dataclass(frozen=True)
class Deployed:
    """A cached model and the bundle that it was exported to."""

    cached: bw.CachedModel
    folder: Path
    manifest: dict[str, Any]


@pytest.fixture(scope="session")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    config = bw.CacheConfig(num_steps=8, threshold=math.inf, reuse_interval=2)
    args = (noise("x", 0, 2, 6, 4), torch.ones(2))
    cached = bw.transform(OneStream(width=32).eval(), config, example_args=args, dynamic_shapes="auto")
    folder = tmp_path_factory.mktemp("deployed") / "bundle"
    return Deployed(cached, folder, bw.export(cached, folder, guarded=True))
