"""What may stand inside blocks: writes in place, autocast, complex rotations, experts, per-sample lists, masks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.architectures.containers import InAList
from tests.architectures.parts import WIDTH, Attention, Mlp, Model, Modulated, names


class AddsInPlace(nn.Module):
    """x += attention; x += mlp."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(), Mlp()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x += self.attn(x + c.unsqueeze(1))
        x += self.mlp(x)
        return x


class InPlaceSums(InAList):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(AddsInPlace() for _ in range(3))


class ScaledInPlace(Modulated):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        y = super().forward(x, c).clone()
        y[:, 1:].mul_(0.5)
        y[:, 0] = x[:, 0]
        return y


class PartsInPlace(InAList):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ScaledInPlace() for _ in range(3))


class CastBlock(Modulated):
    """Norms and gates in float32, products in bfloat16, as original video models do."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.attn(self.norm1(x.float()))
        with torch.autocast("cpu", enabled=False):
            return x + y.float() * self.modulation(c).unsqueeze(1)[..., :WIDTH]


class Autocast(InAList):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CastBlock() for _ in range(3))


class AutocastAround(InAList):
    """All blocks run in one autocast."""

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().trunk(x, c)


class Rotated(Modulated):
    """Turns pairs of channels by complex numbers in double precision, sample by sample over each sample's own length."""

    def forward(self, x: Tensor, c: Tensor, lengths: Tensor, turns: Tensor) -> Tensor:
        out = []
        for sample, length in zip(x, lengths.tolist(), strict=True):
            pairs = torch.view_as_complex(sample[:length].double().reshape(length, -1, 2))
            turned = torch.view_as_real(pairs * turns[:length]).flatten(1)
            out.append(torch.cat([turned.to(sample.dtype), sample[length:]]))
        return super().forward(torch.stack(out), c)


class ListsOfSamples(Model):
    """Takes a list of samples, pads them, and returns a list, as original video models do; sizes travel as a tensor."""

    blocks_found = names("blocks", 3)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Rotated() for _ in range(3))
        angles = torch.outer(torch.arange(8.0, dtype=torch.float64), torch.linspace(1, 0.1, WIDTH // 2, dtype=torch.float64))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def inputs(self, step: int) -> tuple[Tensor, ...]:
        x, t = super().inputs(step)
        return [x[0], x[1, :4]], t  # type: ignore[return-value]

    def trunk(self, x: Tensor, c: Tensor, lengths: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, c, lengths, self.turns)
        return x

    def forward(self, x: list[Tensor], t: Tensor) -> list[Tensor]:
        lengths = torch.tensor([len(sample) for sample in x])
        padded = torch.stack([torch.cat([s, s.new_zeros(6 - len(s), 4)]) for s in x])
        out = self.head(self.trunk(self.patch(padded), self.time(t.view(-1, 1)), lengths))
        return [sample[:length] for sample, length in zip(out, lengths.tolist(), strict=True)]


class Experts(nn.Module):
    """Every expert runs on every token; two per token count."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.gate, self.experts = Attention(), nn.Linear(WIDTH, 4), nn.ModuleList(Mlp() for _ in range(4))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.attn(x + c.unsqueeze(1))
        weights, chosen = self.gate(x).softmax(-1).topk(2, dim=-1)
        gates = torch.zeros(*x.shape[:-1], 4).scatter(-1, chosen, weights)
        return x + sum(gates[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


class MixtureOfExperts(InAList):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Experts() for _ in range(3))


class Masked(InAList):
    """A mask worked out in the forward; single blocks over text and video joined, the text cut off at the end."""

    blocks_found = ("blocks.0", "blocks.1", "blocks.2")

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(3, WIDTH)

    def inputs(self, step: int) -> tuple[Tensor, ...]:
        return (*super().inputs(step), torch.linspace(0, 1, 30).view(2, 5, 3), torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]))

    def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        words = self.text(text) * mask.unsqueeze(-1)
        words = torch.where(mask.bool().unsqueeze(-1), words, torch.zeros_like(words))
        joined = torch.cat([self.patch(x), words], dim=1)
        return self.head(self.trunk(joined, self.time(t.view(-1, 1)))[:, : x.shape[1]])


class Weighted(nn.Module):
    """Weight-normed and functional: no linear operator by that name."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterDict({name: torch.randn(WIDTH, WIDTH) / 4 for name in ("q", "k", "v", "o")})

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = functional.rms_norm(x, (WIDTH,)) + c.unsqueeze(1)
        q, k, v = (torch.einsum("btd,ed->bte", h, functional.normalize(self.w[name], dim=-1)) for name in "qkv")
        scores = torch.einsum("bqd,bkd->bqk", q, k).softmax(-1)
        return x + torch.einsum("bqk,bkd->bqd", scores, v) @ self.w["o"]


class Einsums(InAList):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Weighted() for _ in range(3))


INSIDE = (InPlaceSums, PartsInPlace, Autocast, AutocastAround, ListsOfSamples, MixtureOfExperts, Masked, Einsums)
