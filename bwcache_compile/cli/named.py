"""What a command line says of the model. Needs no torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Named:
    """What a command line says of the model, see `bwcache_compile.cli.options`."""

    factory: str | None = None
    diffusers: str | None = None
    config: Path | None = None
    inputs: Path | None = None
    example: str | None = None
