"""What counts as the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bwcache_compile.ir.compare import difference

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("want", "got", "said"),
    [
        (torch.tensor([NAN, 1.0, INF]), torch.tensor([NAN, 1.0, INF]), None),
        (torch.tensor([NAN, 1.0]), torch.tensor([0.0, 1.0]), "output 0 differs by up to nan"),
        (torch.tensor([INF]), torch.tensor([torch.finfo().max]), "output 0 differs by up to inf"),
        (torch.tensor([1 + 1j]), torch.tensor([1 + 3j]), "output 0 differs by up to 2"),
        (torch.tensor([True]), torch.tensor([False]), "output 0 differs by up to 1"),
        (torch.zeros(0), torch.zeros(0), None),
        (torch.zeros(2), torch.zeros(3), "output 0 is Tensor of another shape or dtype"),
    ],
)
def test_only_nan_equals_nan(want: Tensor, got: Tensor, said: str | None) -> None:
    assert difference([want], [got]) == said
