"""Pieces that the models of this folder share, written as people write them: attention, modulated blocks, embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 16


class Attention(nn.Module):
    """Two heads; over another sequence if one is given."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        batch, rows, width = x.shape
        source = x if other is None else other
        q = self.q(x).view(batch, rows, 2, -1).transpose(1, 2)
        k, v = (part.reshape(batch, source.shape[1], 2, -1).transpose(1, 2) for part in self.kv(source).chunk(2, dim=-1))
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, rows, width))


class Mlp(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(x), approximate="tanh"))


class Modulated(nn.Module):
    """Attention and MLP, each scaled, shifted and gated by the time."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, elementwise_affine=False), nn.LayerNorm(width, elementwise_affine=False)
        self.attn, self.mlp = Attention(width), Mlp(width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Plain(nn.Module):
    """A vision transformer's block: no condition."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = nn.LayerNorm(width), Attention(width), nn.LayerNorm(width), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """What the models share: `trunk` runs the blocks, and nothing else, so that a test can keep what it returned."""

    blocks_found: tuple[str, ...] = ()
    refused: tuple[type[Exception], str] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.time, self.head = nn.Linear(4, WIDTH), nn.Linear(1, WIDTH), nn.Linear(WIDTH, 4)

    def inputs(self, step: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(7)
        base, drift = (torch.randn(2, 6, 4, generator=generator) for _ in range(2))
        return base + 0.1 * step * drift, torch.tensor([0.9 - 0.1 * step, 0.8 - 0.1 * step])

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.head(self.trunk(self.patch(x), self.time(t.view(-1, 1))))


def names(stack: str, count: int) -> tuple[str, ...]:
    return tuple(f"{stack}.{i}" for i in range(count))
