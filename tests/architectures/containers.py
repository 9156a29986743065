"""One stack of blocks, kept and called in the ways that people keep and call them."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tests.architectures.parts import WIDTH, Attention, Mlp, Model, Modulated, Plain, names


class InAList(Model):
    blocks_found = names("blocks", 3)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Modulated() for _ in range(3))

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, c)
        return x


class OneBlock(InAList):
    blocks_found = names("blocks", 1)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Modulated()])


class Checkpointed(InAList):
    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, c, use_reentrant=False)
        return x


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._wrapped = inner

    def forward(self, *args: Tensor) -> Tensor:
        return checkpoint(self._wrapped, *args, use_reentrant=False)


class Wrapped(InAList):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Wrapper(Modulated()) for _ in range(3))


class InSequence(Model):
    blocks_found = names("blocks", 3)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Plain() for _ in range(3)))

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        return self.blocks(x + c.unsqueeze(1))


class AsAttributes(Model):
    blocks_found = ("block_0", "block_1", "block_2")

    def __init__(self) -> None:
        super().__init__()
        for i in range(3):
            setattr(self, f"block_{i}", Modulated())

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        for i in range(3):
            x = getattr(self, f"block_{i}")(x, c)
        return x


class ByName(Model):
    blocks_found = ("trunk_blocks.first", "trunk_blocks.second", "trunk_blocks.third")

    def __init__(self) -> None:
        super().__init__()
        self.trunk_blocks = nn.Sequential(OrderedDict((name, Plain()) for name in ("first", "second", "third")))

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        return self.trunk_blocks(x + c.unsqueeze(1))


class ListsOfLists(Model):
    """Each layer is a list of its parts, called one by one: no module is a block."""

    blocks_found = tuple("+".join(f"layers.{i}.{j}" for j in range(4)) for i in range(3))

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH), Mlp()]) for _ in range(3))

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + c.unsqueeze(1)
        for norm1, attention, norm2, mlp in self.layers:
            x = attention(norm1(x)) + x
            x = mlp(norm2(x)) + x
        return x


class ReachedInto(InAList):
    """The model calls the blocks' parts itself."""

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block.attn(block.norm1(x) + c.unsqueeze(1))
            x = x + block.mlp(block.norm2(x))
        return x


class PartsInLists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms, self.parts = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3)), nn.ModuleList([Attention(), Attention(), Mlp()])

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + c.unsqueeze(1)
        for norm, part in zip(self.norms, self.parts, strict=True):
            x = x + part(norm(x))
        return x


class NestedLists(InAList):
    blocks_found = names("blocks", 2)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PartsInLists() for _ in range(2))


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Modulated() for _ in range(2))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, c)
        return x


class Staged(Model):
    blocks_found = ("stages.0.blocks.0", "stages.0.blocks.1", "stages.1.blocks.0", "stages.1.blocks.1")

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Stage() for _ in range(2))

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x, c)
        return x


class OneBlockOften(Model):
    """The same block over and over: shared weights."""

    blocks_found = ("block", "block@1", "block@2")

    def __init__(self) -> None:
        super().__init__()
        self.block = Modulated()

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        for _ in range(3):
            x = self.block(x, c)
        return x


class Functional(Model):
    """A loop over stacked weights."""

    depth = 4
    blocks_found = names("repeat0", depth)

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(self.depth, 3 * WIDTH, WIDTH) / 4)
        self.out = nn.Parameter(torch.randn(self.depth, WIDTH, WIDTH) / 4)
        self.up = nn.Parameter(torch.randn(self.depth, 2 * WIDTH, WIDTH) / 4)
        self.down = nn.Parameter(torch.randn(self.depth, WIDTH, 2 * WIDTH) / 4)

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        for i in range(self.depth):
            q, k, v = functional.linear(functional.layer_norm(x, (WIDTH,)) + c.unsqueeze(1), self.qkv[i]).chunk(3, dim=-1)
            x = x + functional.scaled_dot_product_attention(q, k, v) @ self.out[i].T
            x = x + functional.gelu(x @ self.up[i].T) @ self.down[i].T
        return x


class TwoFunctionalLayers(Functional):
    depth = 2
    blocks_found = names("repeat0", depth)


class Packed(InAList):
    """No batch: the tokens of all samples in a row."""

    def inputs(self, step: int) -> tuple[Tensor, ...]:
        x, t = super().inputs(step)
        return x[0], t[:1]

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x.unsqueeze(0), c).squeeze(0)
        return x


class PackedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.mlp = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), Mlp()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        q, k, v = self.qkv(x + c).chunk(3, dim=-1)
        x = x + self.out(torch.softmax(q @ k.T, dim=-1) @ v)
        return x + self.mlp(x)


class PackedBlocks(Packed):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PackedBlock() for _ in range(3))

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, c)
        return x


CONTAINERS = (
    InAList, OneBlock, Checkpointed, Wrapped, InSequence, AsAttributes, ByName, ListsOfLists, ReachedInto, NestedLists, Staged,
    OneBlockOften, Functional, TwoFunctionalLayers, Packed, PackedBlocks,
)  # fmt: skip
