"""How published models handle sizes: one program serves every size, bit for bit, in each idiom."""

from __future__ import annotations

import math
from typing import Any

import pytest
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


class Grids(OneStream):
    """Carries sizes around as tensors and reads them in Python, as Wan's original: a list of videos padded to one length."""

    def forward(self, x: list[Tensor], t: Tensor, length: int) -> list[Tensor]:  # type: ignore[override]
        grids = torch.stack([torch.tensor(u.shape[1:3], dtype=torch.long) for u in x])
        flat = [u.flatten(1).transpose(0, 1).unsqueeze(0) for u in x]
        lengths = torch.tensor([u.size(1) for u in flat], dtype=torch.long)
        assert lengths.max() <= length
        joined = torch.cat([torch.cat([u, u.new_zeros(1, length - u.size(1), u.size(2))], dim=1) for u in flat])
        places = torch.arange(64.0).sin()
        h, temb = self.patch(joined), self.embed(t)
        for block in self.blocks:
            rows = []
            for i, (high, wide) in enumerate(grids.tolist()):
                count = high * wide
                table = places[:high].view(high, 1, 1).expand(high, wide, 1) + places[:wide].view(1, wide, 1)
                rows.append(torch.cat([h[i, :count] * table.reshape(count, 1), h[i, count:]]))
            h = block(torch.stack(rows), temb)
        out = self.head(h)
        return [u[: math.prod(grid)].view(*grid, 4).permute(2, 0, 1) for u, grid in zip(out, grids.tolist(), strict=True)]


class Blocky(OneStream):
    """Arithmetic on tensors of sizes, 0-dim tensors among them."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shape = x.new_tensor(x.shape[:2], dtype=torch.int64).unsqueeze(0)[0]
        batch, count = shape.unbind()
        assert torch.div(shape, 2, rounding_mode="floor").cumsum(0).tolist()[1] <= shape[None].prod(dtype=torch.int32).item()
        half = (shape // 1 + 1 - 1).prod() // shape[0]
        out = super().forward(x, t).view(batch, half, 4)
        return out[:, : max([count, half])] * torch.ones(count.item(), 1)


def test_sizes_that_travel_as_tensors() -> None:
    model = Grids().eval().requires_grad_(False)
    cached = bw.transform(model, OFF)
    for high, wide in ((2, 3), (3, 5), (4, 2), (2, 7)):
        cached.reset()
        x = [noise("x", 0, 4, high, wide), noise("y", 0, 4, high, wide)]
        call = (x, torch.tensor([0.5, 0.5]), high * wide + 2)
        with torch.no_grad():
            assert all(torch.equal(a, b) for a, b in zip(cached(*call), model(*call), strict=True)), (high, wide)
    assert (cached.report().captures, len(cached.cached_programs)) == (2, 1)


def test_arithmetic_on_tensors_of_sizes() -> None:
    cached = served(Blocky(), *((tokens(count, batch), {}) for count, batch in ((6, 2), (5, 3), (9, 4))))
    assert (cached.report().captures, len(cached.cached_programs)) == (2, 1)


class Valid(OneStream):
    """Multiplies by what a mask keeps and by a count, which Python reads; the time is as short, and is not read."""

    def forward(self, x: Tensor, t: Tensor, mask: Tensor, count: Tensor) -> Tensor:  # type: ignore[override]
        kept = mask.sum(dim=1).tolist()
        return super().forward(x, t) * sum(kept) * len(range(int(count)))


@pytest.mark.slow
def test_sizes_are_open_beside_values_that_python_reads() -> None:
    mask, other, longer = torch.tensor([[1, 1, 0]]), torch.tensor([[1, 0, 0]]), torch.ones(1, 4, dtype=torch.long)
    values = ((mask, 2), (other, 2), (longer, 2), (mask, 3), (mask, 2))
    sizes = ((6, 2), (5, 3), (9, 4), (6, 2))
    cached = served(Valid(), *(((*tokens(*size), m.clone(), torch.tensor(count)), {}) for m, count in values for size in sizes))
    assert (cached.report().captures, len(cached.cached_programs)) == (5, 4), "one more for the first size, then one for each value"
    said = " are constants of the graph"
    built_in = [note.split(said)[0] for note in cached.plan.notes if said in note]
    assert sorted(built_in) == ["the values of count", "the values of mask"]
