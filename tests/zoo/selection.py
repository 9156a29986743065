"""Which model classes every run of the tests takes, and the mark of the others."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest

ALWAYS = {
    "wan": "one stream, rotary embeddings written in place",
    "flux": "two streams, joined for a second stack",
    "latte": "spatial and temporal blocks in turn",
    "hunyuan_dit": "long skips between the blocks",
    "z_image": "lists of tensors, blocks under autocast, refiners beside the main stack",
}
"""One class for each kind of structure, with what it stands for."""


def selected(names: Iterable[str], always: Container[str] = ALWAYS) -> list[Any]:
    """Return the classes as pytest parameters; those outside `always` are marked `zoo`."""
    return [pytest.param(name, marks=() if name in always else pytest.mark.zoo) for name in names]
