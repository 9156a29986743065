"""Stacks that the stream to the output runs through one after another, with other values joined to it between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.architectures.parts import WIDTH, Mlp, Model, Modulated, Plain, names


class JointBlock(nn.Module):
    """Text and latents through one attention, each with an MLP of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.joint, self.mlp, self.text_mlp = Modulated(), Mlp(), Mlp()

    def forward(self, x: Tensor, text: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        joined = self.joint(torch.cat([text, x], dim=1), c)
        text, x = joined[:, : text.shape[1]], joined[:, text.shape[1] :]
        return x + self.mlp(x), text + self.text_mlp(text)


class Layered(Model):
    """Double blocks, then single ones; before each, half of the text's channels become those of another text layer, as in BriaFibo."""

    blocks_found = (*names("double_blocks", 2), *names("single_blocks", 3))

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(3, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(3, WIDTH // 2) for _ in range(5))
        self.double_blocks = nn.ModuleList(JointBlock() for _ in range(2))
        self.single_blocks = nn.ModuleList(Modulated() for _ in range(3))

    def inputs(self, step: int) -> tuple[Tensor, ...]:
        return (*super().inputs(step), torch.linspace(0, 1, 30).view(2, 5, 3))

    def trunk(self, x: Tensor, c: Tensor, text: Tensor, layers: list[Tensor]) -> Tensor:
        rows = text.shape[1]
        for block, layer in zip(self.double_blocks, layers[:2], strict=True):
            x, text = block(x, torch.cat([text[..., : WIDTH // 2], layer], dim=-1), c)
        for block, layer in zip(self.single_blocks, layers[2:], strict=True):
            text = torch.cat([text[..., : WIDTH // 2], layer], dim=-1)
            joined = block(torch.cat([text, x], dim=1), c)
            text, x = joined[:, :rows], joined[:, rows:]
        return x

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        layers = [layer(text) for layer in self.layers]
        return self.head(self.trunk(self.patch(x), self.time(t.view(-1, 1)), self.text(text), layers))


class TokensBetweenAtoms(Model):
    """Atoms, summed up to tokens and spread back: a token transformer between an encoder and a decoder of atoms, as in Boltz."""

    blocks_found = (*names("encoder", 2), *names("token_transformer", 4), *names("decoder", 2))

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.single = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(5, WIDTH)
        self.atoms = nn.Linear(2, WIDTH)
        self.encoder = nn.ModuleList(Modulated() for _ in range(2))
        self.token_transformer = nn.ModuleList(Modulated() for _ in range(4))
        self.decoder = nn.ModuleList(Modulated() for _ in range(2))

    def inputs(self, step: int) -> tuple[Tensor, ...]:
        owner = torch.nn.functional.one_hot(torch.tensor([0, 0, 1, 1, 2, 2]), 3).float()
        return (
            *super().inputs(step),
            torch.linspace(-1, 1, 30).view(2, 3, 5),
            torch.linspace(1, 0, 24).view(2, 6, 2),
            owner.expand(2, 6, 3),
        )

    def trunk(self, x: Tensor, c: Tensor, single: Tensor, owner: Tensor) -> Tensor:
        for block in self.encoder:
            x = block(x, c)
        tokens = owner.transpose(1, 2) @ torch.relu(self.up(x)) + single
        for block in self.token_transformer:
            tokens = block(tokens, c)
        x = x + owner @ self.down(tokens)
        for block in self.decoder:
            x = block(x, c)
        return x

    def forward(self, x: Tensor, t: Tensor, single: Tensor, atoms: Tensor, owner: Tensor) -> Tensor:
        x = self.patch(x) + self.atoms(atoms)
        return self.head(self.trunk(x, self.time(t.view(-1, 1)), self.single(single), owner))


class RefinedOnBothSides(Model):
    """Refiners of text and of latents before the blocks over both, as in Z-Image: that of the text stays out."""

    blocks_found = (*names("noise_refiner", 2), *names("layers", 3))

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(3, WIDTH)
        self.noise_refiner = nn.ModuleList(Modulated() for _ in range(2))
        self.context_refiner = nn.ModuleList(Plain() for _ in range(2))
        self.layers = nn.ModuleList(Modulated() for _ in range(3))

    def inputs(self, step: int) -> tuple[Tensor, ...]:
        return (*super().inputs(step), torch.linspace(0, 1, 30).view(2, 5, 3))

    def trunk(self, x: Tensor, c: Tensor, text: Tensor) -> Tensor:
        for block in self.noise_refiner:
            x = block(x, c)
        joined = torch.cat([x, text], dim=1)
        for block in self.layers:
            joined = block(joined, c)
        return joined

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        words = self.text(text)
        for block in self.context_refiner:
            words = block(words)
        return self.head(self.trunk(self.patch(x), self.time(t.view(-1, 1)), words)[:, : x.shape[1]])


STAGES = (Layered, TokensBetweenAtoms, RefinedOnBothSides)
