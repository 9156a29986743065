"""Fixtures of the runtime's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from tests.models import OneStream


@pytest.fixture
def model() -> OneStream:
    return OneStream().eval()


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Forget what was compiled, before and after, so that graphs can be counted."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
