"""Residual reuse where a long skip brings an early block's output back into a late one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bwcache_compile as bw

REUSES_SECOND = {"policy": "static", "steps_mask": (0, 1, 0)}


class Block(nn.Module):
    """A residual block; a late one takes an early one's output too."""

    def __init__(self, width: int, late: bool, norm: bool = False) -> None:
        super().__init__()
        self.merge = nn.Linear(2 * width, width) if late else None
        self.merge_norm = nn.LayerNorm(2 * width) if norm else nn.Identity()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.merge is not None and skip is not None:
            x = self.merge(self.merge_norm(torch.cat([x, skip], dim=-1)))
        q, k, v = self.qkv(self.norm(x)).unsqueeze(1).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + self.down(F.gelu(self.up(x)))


class UViT(nn.Module):
    """Blocks in, one in the middle, and blocks out, each of which takes the output of its counterpart."""

    def __init__(self, width: int = 16, norm: bool = False) -> None:
        super().__init__()
        self.embed, self.time, self.head = nn.Linear(4, width), nn.Linear(1, width), nn.Linear(width, 4)
        self.into = nn.ModuleList(Block(width, late=False) for _ in range(2))
        self.middle = Block(width, late=False)
        self.out_of = nn.ModuleList(Block(width, late=True, norm=norm) for _ in range(2))

    def before(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([self.time(t).view(1, 1, -1), self.embed(x)], dim=1)

    def blocks(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.into:
            x = block(x)
            skips.append(x)
        x = self.middle(x)
        for block in self.out_of:
            x = block(x, skips.pop())
        return x

    def after(self, x: Tensor) -> Tensor:
        return self.head(x[:, 1:])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.after(self.blocks(self.before(x, t)))


class HDiT(nn.Module):
    """Two levels: the middle runs on a quarter of the tokens, and what it returns is mixed with the outer level by a learned share."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, width), nn.Linear(width, 4)
        self.down = nn.ModuleList(Block(width, late=False) for _ in range(2))
        self.merge, self.split = nn.Linear(4 * width, 2 * width), nn.Linear(2 * width, 4 * width)
        self.middle = nn.ModuleList(Block(2 * width, late=False) for _ in range(3))
        self.up = nn.ModuleList(Block(width, late=False) for _ in range(2))
        self.share = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.embed(x) + t
        for block in self.down:
            x = block(x)
        merged = self.merge(x.reshape(1, x.shape[1] // 4, -1))
        for block in self.middle:
            merged = block(merged)
        x = torch.lerp(x, self.split(merged).reshape(x.shape), self.share)
        for block in self.up:
            x = block(x)
        return self.head(x)


def inputs(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(1, 12, 4, generator=generator), torch.tensor([1.0 - step / 4])


def made(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return model.eval()


@pytest.mark.parametrize("norm", [False, True], ids=["as in U-ViT", "with a norm, as in HunyuanDiT"])
def test_the_residual_follows_the_stream_through_merged_skips(norm: bool) -> None:
    model = made(UViT(norm=norm))
    assert isinstance(model, UViT)
    cached = bw.transform(model, bw.CacheConfig(reuse="residual", **REUSES_SECOND))
    with torch.no_grad():
        outputs = [cached(*inputs(step)) for step in range(3)]
        first, second = (model.before(*inputs(step)) for step in range(2))
        assert torch.equal(outputs[0], model(*inputs(0)))
        assert torch.equal(outputs[1], model.after(second + (model.blocks(first) - first)))
        assert torch.equal(outputs[2], model(*inputs(2)))
    assert len(cached.plan.blocks) == 5


def test_levels_of_other_sizes_are_held_or_refused() -> None:
    model = made(HDiT())
    cached = bw.transform(model, bw.CacheConfig(**REUSES_SECOND))
    with torch.no_grad():
        outputs = [cached(*inputs(step)) for step in range(3)]
        assert torch.equal(outputs[0], model(*inputs(0)))
        assert not torch.equal(outputs[1], model(*inputs(1)))
        assert torch.equal(outputs[2], model(*inputs(2)))
    assert len(cached.plan.blocks) == 7
    with pytest.raises(bw.ConfigError, match="reuse='residual' does not fit HDiT: "), torch.no_grad():
        bw.transform(model, bw.CacheConfig(reuse="residual", **REUSES_SECOND))(*inputs(0))
