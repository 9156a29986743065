"""Tiny diffusion transformers in plain torch: a few operators a block, one for each shape of graph that the passes must know."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from bwcache_compile.capture.flatten import flat_program
from bwcache_compile.ir.program import ModelProgram


class Tiny(nn.Module):
    """What the models share: weights drawn from a fixed seed, and inputs to call them with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)

    def example(self, batch: int = 1, step: int = 0) -> tuple[Tensor, ...]:
        """Return `x` and `t`; `x` moves a little from step to step."""
        return (noise("x", step, batch, 6, 4), torch.full((batch,), 1 - step / 8))


def noise(name: str, step: int, *shape: int) -> Tensor:
    """Draw a tensor that depends on its name, and a little on the step."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    base, drift = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    return base + 0.05 * step * drift


def captured(model: Tiny, *args: Tensor) -> ModelProgram:
    """Export a model in evaluation mode, on its own example if no arguments are given."""
    model.eval().requires_grad_(False)
    with torch.no_grad():
        return flat_program(torch.export.export(model, args or model.example(), strict=False), type(model).__name__)


class Block(nn.Module):
    """x + down(gelu(up(x * temb)))."""

    def __init__(self, width: int, inner: int | None = None) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner or width)
        self.down = nn.Linear(inner or width, width)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(x * temb)))


class OneStream(Tiny):
    """One stack of equal blocks, as Wan and LTX."""

    def __init__(self, depth: int = 3, width: int = 8) -> None:
        super().__init__()
        self.patch, self.time, self.head = nn.Linear(4, width), nn.Linear(1, width), nn.Linear(width, 4)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def embed(self, t: Tensor) -> Tensor:
        return self.time(t.view(-1, 1, 1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, temb = self.patch(x), self.embed(t)
        for block in self.blocks:
            x = block(x, temb)
        return self.head(x)


class OddMiddle(OneStream):
    """The middle block is wider than its siblings inside: blocks of one class, but not equal."""

    def __init__(self) -> None:
        super().__init__(depth=3)
        self.blocks[1] = Block(8, inner=16)


class Growing(OneStream):
    """Doubles the tokens between the blocks: nothing of one size is handed on."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, temb = self.patch(x), self.embed(t)
        for block in self.blocks:
            x = block(x, temb).repeat_interleave(2, dim=1)
        return self.head(x)


class InPlaceBlock(Block):
    """Rotates halves by writing into a fresh tensor, as Wan's rotary embedding."""

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        rotated = torch.empty_like(x)
        rotated[..., 0::2] = -x[..., 1::2]
        rotated[..., 1::2] = x[..., 0::2]
        return super().forward(rotated, temb)


class InPlace(OneStream):
    def __init__(self, depth: int = 3, width: int = 8) -> None:
        super().__init__(depth, width)
        self.blocks = nn.ModuleList(InPlaceBlock(width) for _ in range(depth))


class CountingBlock(Block):
    """Writes to a buffer of its own, which a reused step would not."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        self.calls.add_(1)
        return super().forward(x, temb)


class BufferWriter(OneStream):
    def __init__(self, depth: int = 2) -> None:
        super().__init__(depth)
        self.blocks = nn.ModuleList(CountingBlock(8) for _ in range(depth))


class AddingBlock(Block):
    """Adds to the hidden state in place: the first block writes to what the prologue made."""

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return x.add_(self.down(functional.gelu(self.up(x * temb))))


class InPlaceResidual(OneStream):
    def __init__(self, depth: int = 2) -> None:
        super().__init__(depth)
        self.blocks = nn.ModuleList(AddingBlock(8) for _ in range(depth))


class CastingBlock(Block):
    """Casts to the dtype it has, and drops out nothing: traces that differ from `Block` by what does nothing."""

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return functional.dropout(super().forward(x.to(torch.float32), temb.type_as(x)), 0.1, self.training)


class Casting(OneStream):
    def __init__(self, depth: int = 2) -> None:
        super().__init__(depth)
        self.blocks = nn.ModuleList(CastingBlock(8) for _ in range(depth))


class Exposed(OneStream):
    """Scales the hidden state in place after the blocks, and returns a view of it beside the output."""

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x, temb = self.patch(x), self.embed(t)
        for block in self.blocks:
            x = block(x, temb)
        x.mul_(2)
        return self.head(x), x[:, :2]


class Numbered(Tiny):
    """A model in a numbered list: memory that it makes and writes to is its own, and the capture keeps such writes in place."""

    def __init__(self, model: Tiny) -> None:
        super().__init__()
        self.parts = nn.ModuleList([model])

    def forward(self, x: Tensor, t: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.parts[0](x, t)


class PostNormBlock(Block):
    """No residual: the output is a norm, so nothing continues the input."""

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return functional.layer_norm(super().forward(x, temb), (x.shape[-1],))


class PostNorm(OneStream):
    def __init__(self, depth: int = 2) -> None:
        super().__init__(depth)
        self.blocks = nn.ModuleList(PostNormBlock(8) for _ in range(depth))


def plain_block(x: Tensor, temb: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return x + functional.linear(functional.gelu(functional.linear(x * temb, up)), down)


class Functional(Tiny):
    """Blocks as a plain function over a flat list of parameters: no module names to find them by."""

    def __init__(self, depth: int = 3, width: int = 8) -> None:
        super().__init__()
        shapes = [(width, 4), *[(width, width)] * (2 * depth), (4, width)]
        self.weights = nn.ParameterList(torch.randn(shape) / 4 for shape in shapes)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        first, *weights, last = self.weights
        x, temb = functional.linear(x, first), torch.cos(t.view(-1, 1, 1))
        for up, down in zip(weights[0::2], weights[1::2], strict=True):
            x = plain_block(x, temb, up, down)
        return functional.linear(x, last)


class DoubleBlock(nn.Module):
    """Two streams that look at one another through their means."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.video, self.text = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        video, words = x.mean(1, keepdim=True), text.mean(1, keepdim=True)
        return x + self.video(functional.gelu(x * temb + words)), text + self.text(functional.gelu(text * temb + video))


class TwoStream(OneStream):
    """Double blocks, then single blocks over both streams joined, as Flux and HunyuanVideo; the output takes the video rows."""

    def __init__(self, double: int = 2, single: int = 2, width: int = 8) -> None:
        super().__init__(0, width)
        del self.blocks
        self.words = nn.Linear(5, width)
        self.double_blocks = nn.ModuleList(DoubleBlock(width) for _ in range(double))
        self.single_blocks = nn.ModuleList(Block(width) for _ in range(single))

    def example(self, batch: int = 1, step: int = 0) -> tuple[Tensor, ...]:
        x, t = super().example(batch, step)
        return x, noise("text", 0, batch, 2, 5), t

    def forward(self, x: Tensor, text: Tensor, t: Tensor) -> Tensor:
        x, text, temb = self.patch(x), self.words(text), self.embed(t)
        for block in self.double_blocks:
            x, text = block(x, text, temb)
        joined = torch.cat([text, x], dim=1)
        for block in self.single_blocks:
            joined = block(joined, temb)
        return self.head(joined[:, text.shape[1] :])


class Refined(TwoStream):
    """A stack of text refiners beside the main stack, as HunyuanVideo's: repeated blocks that are not to be cached."""

    def __init__(self, refiners: int = 2, depth: int = 3, width: int = 8) -> None:
        super().__init__(0, 0, width)
        self.refiner = nn.ModuleList(Block(width) for _ in range(refiners))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: Tensor, text: Tensor, t: Tensor) -> Tensor:
        x, text, temb = self.patch(x), self.words(text), self.embed(t)
        for block in self.refiner:
            text = block(text, temb)
        words = text.mean(1, keepdim=True)
        for block in self.blocks:
            x = block(x, temb + words)
        return self.head(x)


class Interleaved(Tiny):
    """Spatial and temporal blocks in turn, with permutes between, as Latte: (batch, frames, places, channels)."""

    def __init__(self, depth: int = 2, width: int = 8) -> None:
        super().__init__()
        self.patch, self.time, self.head = nn.Linear(4, width), nn.Linear(1, width), nn.Linear(width, 4)
        self.spatial = nn.ModuleList(Block(width) for _ in range(depth))
        self.temporal = nn.ModuleList(Block(width) for _ in range(depth))

    def example(self, batch: int = 1, step: int = 0) -> tuple[Tensor, ...]:
        return noise("x", step, batch, 2, 3, 4), torch.full((batch,), 1 - step / 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        batch, frames, places, _ = x.shape
        x, temb = self.patch(x).reshape(batch * frames, places, -1), self.time(t[:1])
        for spatial, temporal in zip(self.spatial, self.temporal, strict=True):
            x = spatial(x, temb)
            x = x.reshape(batch, frames, places, -1).permute(0, 2, 1, 3).reshape(batch * places, frames, -1)
            x = temporal(x, temb)
            x = x.reshape(batch, places, frames, -1).permute(0, 2, 1, 3).reshape(batch * frames, places, -1)
        return self.head(x).reshape(batch, frames, places, -1)
