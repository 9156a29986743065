"""Sizes and masks that models read in Python: published idioms, exported and run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

import bwcache_compile as bw
from tests.exporters.helpers import CONFIG
from tests.models import OneStream, noise


class CrossBlock(nn.Module):
    """Attends to packed text: the bias is 0 where image and text are of one sample, as in PixArt's original."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, text: Tensor, temb: Tensor, lengths: list[int]) -> Tensor:
        batch, tokens, width = x.shape
        bias = torch.full((batch * tokens, sum(lengths)), float("-inf"), dtype=x.dtype, device=x.device)
        at = 0
        for i, length in enumerate(lengths):
            bias[i * tokens : (i + 1) * tokens, at : at + length] = 0
            at += length
        q = self.q(x * temb).view(1, -1, 2, width // 2).transpose(1, 2)
        k, v = (part.transpose(1, 2) for part in self.kv(text).view(1, -1, 2, 2, width // 2).unbind(2))
        return x + functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(x.shape)


class PackedText(OneStream):
    """Packs the text of all samples by their mask before cross attention, as PixArt's original."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.text = nn.Linear(3, 8)
        self.blocks = nn.ModuleList(CrossBlock(8) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor, y: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        x, temb, mask = self.patch(x), self.embed(t), mask.squeeze(1).squeeze(1)
        y = self.text(y).squeeze(1).masked_select(mask.unsqueeze(-1) != 0).view(1, -1, x.shape[-1])
        lengths = mask.sum(dim=1).tolist()
        for block in self.blocks:
            x = block(x, y, temb, lengths)
        return self.head(x)


@pytest.mark.parametrize("opset", [20, pytest.param(23, marks=pytest.mark.slow)])
def test_text_packed_by_a_mask_whose_values_are_built_in(opset: int, tmp_path: Path) -> None:
    mask = (torch.arange(5) < torch.tensor([[3], [5]])).long().view(2, 1, 1, 5)
    model, (x, t), text = PackedText().eval(), OneStream().example(2), noise("y", 0, 2, 1, 5, 3)
    cached = bw.transform(model, CONFIG, example_args=(x, t, text, mask), dynamic_shapes={"x": {1: Dim.AUTO}})
    longer = noise("x", 0, 2, 9, 4)
    with torch.no_grad():
        expected = model(longer, t, text, mask).numpy()
    manifest = bw.export(cached, tmp_path / "bundle", opset=opset)
    assert [entry.input for entry in manifest.values] == ["mask"]
    assert [symbol.place for symbol in manifest.symbols] == ["x[1]"]
    session = bw.load(tmp_path / "bundle")
    np.testing.assert_allclose(session(longer, t, text, mask), expected, rtol=0, atol=1e-5)
    with pytest.raises(bw.StateError, match="the values of mask differ from those at export"):
        session(longer, t, text, 1 - mask)


class Grid(OneStream):
    """Carries the grid as a tensor and reads it in every block and at the end, as the originals of Wan and SkyReels V2."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.register_buffer("places", torch.arange(3 * 16.0).view(3, 16).sin())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        grid = x.new_tensor(x.shape[2:], dtype=torch.int64)
        h, temb = self.patch(x.flatten(2).transpose(1, 2)), self.embed(t)
        for block in self.blocks:
            f, height, width = grid.tolist()
            table = self.places[0, :f].view(f, 1, 1) + self.places[1, :height].view(1, height, 1) + self.places[2, :width]
            h = block(h * table.reshape(f * height * width, 1) + torch.arange(grid.prod()).view(-1, 1), temb)
        h = self.head(h).view(x.shape[0], *grid, 2, 2, 1)
        frames, rows, columns = (size * by for size, by in zip(grid, (1, 2, 2), strict=True))
        return torch.einsum("bfhwpqc->bcfhpwq", h).reshape(x.shape[0], 1, frames, rows, columns)


@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_a_grid_that_travels_as_a_tensor_stays_open(form: str, tmp_path: Path) -> None:
    model, t = Grid().eval(), torch.ones(2)
    cached = bw.transform(model, CONFIG, example_args=(noise("x", 0, 2, 4, 2, 3, 4), t), dynamic_shapes="auto")
    manifest = bw.export(cached, tmp_path / "bundle", form)
    assert sorted(symbol.place for symbol in manifest.symbols) == ["x[0]", "x[2]", "x[3]", "x[4]"]
    session = bw.load(tmp_path / "bundle", **({"backend": "torch", "allow_code": True} if form == "pt2" else {}))
    x = noise("x", 0, 2, 4, 3, 5, 2)
    with torch.no_grad():
        torch.testing.assert_close(torch.as_tensor(session(x, t)), model(x, t), rtol=0, atol=1e-5)


class OneSize(OneStream):
    """Assumes the sizes at hand, so that none stays open."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        assert tuple(map(int, x.shape)) == (1, 6, 4)
        return super().forward(x, t)


def test_sizes_that_turned_out_fixed(tmp_path: Path) -> None:
    cached = bw.transform(OneSize().eval(), CONFIG, example_args=OneStream().example(), dynamic_shapes="auto")
    manifest = bw.export(cached, tmp_path / "bundle")
    assert manifest.symbols == ()
    assert manifest.inputs[0].shape == (1, 6, 4)
