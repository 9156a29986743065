"""Stacks that are not one plain chain: skips, hints, glue, several streams, blocks that differ, stacks beside."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.architectures.parts import WIDTH, Attention, Mlp, Model, Modulated, Plain, names


class SkipBlock(Modulated):
    """Joins an earlier block's output to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.join = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, c: Tensor, skip: Tensor | None = None) -> Tensor:
        return super().forward(x if skip is None else self.join(torch.cat([x, skip], dim=-1)), c)


class UShaped(Model):
    blocks_found = ("in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0", "out_blocks.1")

    def __init__(self) -> None:
        super().__init__()
        self.in_blocks = nn.ModuleList(Modulated() for _ in range(2))
        self.mid_block = Modulated()
        self.out_blocks = nn.ModuleList(SkipBlock() for _ in range(2))

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        skips = []
        for block in self.in_blocks:
            x = block(x, c)
            skips.append(x)
        x = self.mid_block(x, c)
        for block in self.out_blocks:
            x = block(x, c, skips.pop())
        return x


class LongSkip(Model):
    """Block 5 takes what block 2 returned."""

    blocks_found = names("blocks", 6)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SkipBlock() if i == 5 else Modulated() for i in range(6))

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            x = block(x, c, kept[2]) if i == 5 else block(x, c)
            kept.append(x)
        return x


class Hinted(Model):
    """Every second block is followed by a hint from blocks beside the stack, which see an input of their own."""

    blocks_found = names("blocks", 4)

    def __init__(self) -> None:
        super().__init__()
        self.control = nn.Linear(4, WIDTH)
        self.hint_blocks = nn.ModuleList(Modulated() for _ in range(2))
        self.blocks = nn.ModuleList(Modulated() for _ in range(4))

    def inputs(self, step: int) -> tuple[Tensor, ...]:
        x, t = super().inputs(step)
        return x, t, torch.linspace(-1, 1, 48).view(2, 6, 4)

    def trunk(self, x: Tensor, c: Tensor, *hints: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x, c)
            if i % 2 == 0:
                x = x + 0.5 * hints[i // 2]
        return x

    def forward(self, x: Tensor, t: Tensor, control: Tensor) -> Tensor:
        c, hint, hints = self.time(t.view(-1, 1)), self.control(control), []
        for block in self.hint_blocks:
            hint = block(hint, c)
            hints.append(hint)
        return self.head(self.trunk(self.patch(x), c, *hints))


class Controlled(Model):
    """Residuals from elsewhere, one per block, as a control network gives them."""

    blocks_found = names("blocks", 3)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Modulated() for _ in range(3))

    def inputs(self, step: int) -> tuple[Tensor, ...]:
        residuals = [torch.full((2, 6, WIDTH), 0.1 * i + 0.01 * step) for i in range(3)]
        return (*super().inputs(step), residuals)  # type: ignore[return-value]

    def trunk(self, x: Tensor, c: Tensor, residuals: list[Tensor]) -> Tensor:
        for block, residual in zip(self.blocks, residuals, strict=True):
            x = block(x + residual, c)
        return x

    def forward(self, x: Tensor, t: Tensor, residuals: list[Tensor]) -> Tensor:
        return self.head(self.trunk(self.patch(x), self.time(t.view(-1, 1)), residuals))


class PerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(), Mlp()

    def forward(self, x: Tensor, shift: Tensor, gate: Tensor) -> Tensor:
        x = x + gate * self.attn(x + shift)
        return x + gate * self.mlp(x + shift)


class PerBlockInputs(Model):
    """One network works out every block's modulation beforehand."""

    blocks_found = names("blocks", 3)

    def __init__(self) -> None:
        super().__init__()
        self.approximator = nn.Linear(WIDTH, 6 * WIDTH)
        self.blocks = nn.ModuleList(PerBlock() for _ in range(3))

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        modulation = self.approximator(c).view(-1, 6, WIDTH)
        for i, block in enumerate(self.blocks):
            x = block(x, modulation[:, 2 * i : 2 * i + 1], modulation[:, 2 * i + 1 : 2 * i + 2])
        return x


class InTurn(Model):
    """One list: even blocks see the places of a frame, odd ones the frames of a place, with embeddings and permutes between."""

    blocks_found = names("blocks", 4)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Modulated() for _ in range(4))
        self.frames = nn.Parameter(torch.randn(1, 2, WIDTH))

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        batch = x.shape[0]
        x = x.view(batch * 2, 3, WIDTH)
        for i in range(0, 4, 2):
            spatial, temporal = self.blocks[i : i + 2]
            x = spatial(x, c.repeat_interleave(2, dim=0))
            x = x.view(batch, 2, 3, WIDTH).transpose(1, 2).reshape(batch * 3, 2, WIDTH)
            if i == 0:
                x = x + self.frames
            x = temporal(x, c.repeat_interleave(3, dim=0))
            x = x.view(batch, 3, 2, WIDTH).transpose(1, 2).reshape(batch * 2, 3, WIDTH)
        return x.view(batch, 6, WIDTH)


class TwoKinds(Model):
    """Attention blocks and mixing blocks of another class in one list; a lone projection between."""

    blocks_found = ("blocks.0", "blocks.1", "blocks.3", "blocks.4")

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Plain(), Plain(), nn.Linear(WIDTH, WIDTH), Mlp(), Mlp()])

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + c.unsqueeze(1)
        for block in self.blocks:
            x = block(x)
        return x


class Triple(nn.Module):
    """Three streams that read one another."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.ModuleList(Attention() for _ in range(3))
        self.mlps = nn.ModuleList(Mlp() for _ in range(3))

    def forward(self, x: Tensor, text: Tensor, audio: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        everything = torch.cat([x, text, audio], dim=1) + c.unsqueeze(1)
        x, text, audio = (s + attend(s, everything) for s, attend in zip((x, text, audio), self.own, strict=True))
        return x + self.mlps[0](x), text + self.mlps[1](text), audio + self.mlps[2](audio)


class ThreeStreams(Model):
    blocks_found = names("blocks", 2)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Triple() for _ in range(2))
        self.text, self.audio = nn.Linear(3, WIDTH), nn.Linear(2, WIDTH)

    def inputs(self, step: int) -> tuple[Tensor, ...]:
        return (*super().inputs(step), torch.linspace(0, 1, 30).view(2, 5, 3), torch.linspace(1, 0, 16).view(2, 4, 2) + 0.1 * step)

    def trunk(self, x: Tensor, c: Tensor, text: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            x, text, audio = block(x, text, audio, c)
        return x, audio

    def forward(self, x: Tensor, t: Tensor, text: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        x, audio = self.trunk(self.patch(x), self.time(t.view(-1, 1)), self.text(text), self.audio(audio))
        return self.head(x), audio


class Encoded(Model):
    """An encoder of text and a decoder that attends to it between its blocks; encoder and decoder blocks are of one class."""

    blocks_found = ("cross.0", "decoder.0", "cross.1", "decoder.1", "cross.2", "decoder.2")

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(3, WIDTH)
        self.encoder = nn.ModuleList(Plain() for _ in range(3))
        self.decoder = nn.ModuleList(Plain() for _ in range(3))
        self.cross = nn.ModuleList(Attention() for _ in range(3))

    def inputs(self, step: int) -> tuple[Tensor, ...]:
        return (*super().inputs(step), torch.linspace(0, 1, 30).view(2, 5, 3))

    def trunk(self, x: Tensor, words: Tensor) -> Tensor:
        for cross, block in zip(self.cross, self.decoder, strict=True):
            x = block(x + cross(x, words))
        return x

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        words = self.text(text)
        for block in self.encoder:
            words = block(words)
        return self.head(self.trunk(self.patch(x) + self.time(t.view(-1, 1, 1)), words))


SHAPES = (UShaped, LongSkip, Hinted, Controlled, PerBlockInputs, InTurn, TwoKinds, ThreeStreams, Encoded)
