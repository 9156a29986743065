"""How published models read tensors in Python: each idiom is captured, and another value gets a program of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bwcache_compile as bw
from tests.models import OneStream, noise

OFF = bw.CacheConfig(threshold=0, num_steps=2)


def served(model: nn.Module, *calls: tuple[Any, ...]) -> bw.CachedModel:
    """Compare a cached model with the model at each call, bit for bit."""
    cached = bw.transform(model.eval().requires_grad_(False), OFF)
    for inputs in calls:
        cached.reset()
        with torch.no_grad():
            assert torch.equal(cached(*inputs), model(*inputs))
    return cached


class TextAndImage(OneStream):
    """Puts the valid tokens of image and text first, as HunyuanVideo-1.5; a video from text alone has an image of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.pixels = nn.Linear(3, 8), nn.Linear(5, 8)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor, image: Tensor) -> Tensor:  # type: ignore[override]
        words, pixels = self.words(text), self.pixels(image)
        if torch.all(image == 0):
            pixels = pixels * 0.0
            seen = torch.zeros((image.shape[0], image.shape[1]), dtype=mask.dtype, device=mask.device)
        else:
            seen = torch.ones((image.shape[0], image.shape[1]), dtype=mask.dtype, device=mask.device)
        rows, masks = [], []
        for word, pixel, valid, shown in zip(words, pixels, mask.bool(), seen.bool(), strict=True):
            rows.append(torch.cat([pixel[shown], word[valid], pixel[~shown], torch.zeros_like(word[~valid])], dim=0))
            masks.append(torch.cat([shown[shown], valid[valid], shown[~shown], valid[~valid]], dim=0))
        joined, kept = torch.stack(rows), torch.stack(masks)
        h, temb = self.patch(x), self.embed(t) + (joined * kept.unsqueeze(-1)).sum(dim=1, keepdim=True)
        for block in self.blocks:
            h = block(h, temb)
        return self.head(h)


def asked(lengths: tuple[int, ...], image: bool, step: int = 0) -> tuple[Tensor, ...]:
    mask = (torch.arange(5) < torch.tensor(lengths).unsqueeze(1)).long()
    x, t = OneStream().example(batch=len(lengths), step=step)
    pixels = noise("image", step, len(lengths), 900, 5) * image
    return x, t, noise("text", 0, len(lengths), 5, 3), mask, pixels


@pytest.mark.zoo
def test_text_and_image_to_video() -> None:
    calls = [(3, 5), (1, 0), (5, 5)]
    model = TextAndImage()
    cached = served(model, *(asked(lengths, image, step) for lengths in calls for image in (False, True) for step in (0, 1)))
    assert cached.report().captures == 2 * len(calls), "one for each mask with an image and one without, whatever the image"
    assert any(
        note.startswith("the values of image are constants of the graph") and "torch.all(image == 0)" in note for note in cached.plan.notes
    )


def test_a_bundle_cannot_compare_what_is_computed_of_a_large_input(tmp_path: Path) -> None:
    cached = bw.transform(TextAndImage().eval(), OFF, example_args=asked((3, 5), True))
    with pytest.raises(bw.ExportError, match=r"^TextAndImage reads in Python a value that it computes from image, (.|\n)*pass a bool"):
        bw.export(cached, tmp_path / "bundle")


class Changing(OneStream):
    """Writes to what it was given before it looks at it."""

    def forward(self, x: Tensor, t: Tensor, image: Tensor) -> Tensor:  # type: ignore[override]
        image[0] = 1
        return super().forward(x, t) if (image == 0).any() else x


def test_a_large_input_that_was_written_to_is_not_followed() -> None:
    with pytest.raises(bw.CaptureError, match=r"if \(image == 0\).any\(\)"):
        bw.transform(Changing().eval(), OFF, example_args=(*OneStream().example(), torch.zeros(2, 900, 5)))


class Reads(OneStream):
    """Cuts or scales the tokens by what a function reads of a tensor."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(depth=2)
        self.function = function

    def forward(self, x: Tensor, t: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        return self.function(super().forward(x, t), lengths)


def zero_dim_in_a_view(x: Tensor, lengths: Tensor) -> Tensor:
    grid = torch.tensor([2, 3])
    return x.view(x.shape[0], *grid, 4).sum(dim=1) * x.new_ones(list(lengths)).sum()


def deep_copied(x: Tensor, lengths: Tensor) -> Tensor:
    sizes = copy.deepcopy(lengths)
    sizes[0] += 1
    return x[:, : sizes.tolist()[0]] * lengths.tolist()[0]


def deep_copied_hidden_state(x: Tensor, lengths: Tensor) -> Tensor:
    return copy.deepcopy(x) * int(lengths[0])


def largest_in_python(x: Tensor, lengths: Tensor) -> Tensor:
    assert max(list(lengths)) <= 9
    bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return x[:, : max(list(lengths))] * min(list(lengths)) + torch.arange(max(bounds.tolist())).sum() + sum(lengths)


def longest_of_a_tensor(x: Tensor, lengths: Tensor) -> Tensor:
    mask = torch.zeros([len(lengths), x.shape[1], max(lengths)], dtype=torch.bool)
    for i, length in enumerate(lengths):
        mask[i, :, :length] = 1
    return x[:, : max(lengths)] * mask.sum() * sum(range(min(lengths))) + sum(lengths) + max(lengths, key=lambda length: -length)


def zero_dim_in_a_slice(x: Tensor, lengths: Tensor) -> Tensor:
    return x[:, lengths[0] - 1 : lengths[1]]


def one_row(x: Tensor, lengths: Tensor) -> Tensor:
    only, none = lengths == lengths.max(), lengths > lengths.max()
    return x[:, :2][:, only] + x[:, :2][:, none].sum() + torch.nonzero(only).sum() + x[..., :2, :].masked_select(only.unsqueeze(-1)).sum()


def repeated(x: Tensor, lengths: Tensor) -> Tensor:
    return x[:, :2].repeat_interleave(lengths, dim=1)


@pytest.mark.parametrize(
    "function",
    [
        zero_dim_in_a_view,
        pytest.param(deep_copied, marks=pytest.mark.slow),
        deep_copied_hidden_state,
        pytest.param(largest_in_python, marks=pytest.mark.slow),
        longest_of_a_tensor,
        pytest.param(zero_dim_in_a_slice, marks=pytest.mark.slow),
        one_row,
        pytest.param(repeated, marks=pytest.mark.slow),
    ],
)
def test_lengths_that_python_reads(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, t = OneStream().example(batch=2)
    cached = served(Reads(function), *((x, t, torch.tensor(lengths)) for lengths in ((2, 3), (3, 4), (2, 3))))
    assert cached.report().captures <= 2


def test_max_and_min_of_python_are_restored_after_a_failed_capture() -> None:
    before, model = (max, min), Reads(lambda x, _: x * len(range(int(max(x[0, :, 0]) * 9)))).eval()
    with pytest.raises(bw.CaptureError, match=r"range\(int\(max\(x"):
        bw.transform(model, OFF, example_args=(*OneStream().example(), torch.ones(1)))
    assert (max, min) == before


class Described(OneStream):
    """Reads whether guidance is on, and of the mask its type, shape and place alone."""

    def forward(self, x: Tensor, t: Tensor, guided: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        assert mask.type() == "torch.LongTensor"
        assert (mask.dtype, mask.device, mask.shape, mask.ndim, mask.is_cuda) == (torch.long, x.device, (6,), 1, False)
        assert not any((mask.is_sparse, mask.is_quantized, mask.is_mps, mask.is_nested, mask.retains_grad, mask.is_xpu))
        x = x * mask.type(x.dtype).view(-1, 1)
        return super().forward(x, t) if guided else x


def test_metadata_of_a_tensor_is_no_read_of_its_values() -> None:
    masks = torch.ones(6, dtype=torch.long), torch.arange(6)
    cached = served(Described(), *((*OneStream().example(), torch.tensor(True), mask) for mask in masks))
    assert cached.report().captures == 1
    built_in = " are constants of the graph"
    assert [note.split(built_in)[0] for note in cached.plan.notes if built_in in note] == ["the values of guided"]
