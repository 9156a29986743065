"""How published models handle sizes: one program serves every size, bit for bit, in each idiom."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import bwcache_compile as bw
from tests.models import OneStream, noise

OFF = bw.CacheConfig(threshold=0, num_steps=2)


class Square(OneStream):
    """Takes the tokens for a square image, as DiT, SiT, Latte and U-ViT do."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out = super().forward(x, t)
        side = int(out.shape[1] ** 0.5)
        assert side * side == out.shape[1]
        image = out.reshape(out.shape[0], side, side, -1)
        return torch.einsum("nhwc->nchw", image)


class Wrapped(OneStream):
    """Passes on whatever it is called with, as wrappers do."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return super().forward(*args, **kwargs)


def tokens(count: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    return noise("x", 0, batch, count, 4), torch.full((batch,), 0.5)


def served(model: nn.Module, *calls: tuple[tuple[Any, ...], dict[str, Any]]) -> bw.CachedModel:
    """Compare a cached model with the model at each call, bit for bit."""
    cached = bw.transform(model.eval().requires_grad_(False), OFF)
    for args, kwargs in calls:
        cached.reset()
        with torch.no_grad():
            assert torch.equal(cached(*args, **kwargs), model(*args, **kwargs)), [getattr(a, "shape", a) for a in args]
    return cached


def test_square_roots_of_sizes() -> None:
    cached = served(Square(), *((tokens(side**2, batch), {}) for side, batch in ((3, 2), (4, 2), (5, 2), (12, 3), (3, 2))))
    assert (cached.report().captures, len(cached.cached_programs)) == (2, 1)


def test_calls_that_are_passed_on() -> None:
    calls = [((x,), {"t": t}) for x, t in map(tokens, (6, 5, 9))]
    cached = served(Wrapped(), *calls)
    assert (cached.report().captures, len(cached.cached_programs)) == (2, 1)
