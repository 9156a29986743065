"""Which tensors Python may read while a model is traced: those made of shapes and numbers, until something else is written to them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import bwcache_compile as bw
from bwcache_compile.bundle.manifest import ValueEntry
from bwcache_compile.capture.capture import capture
from bwcache_compile.capture.known import KnownValues
from tests.models import OneStream


def lengths(x: Tensor) -> Tensor:
    return torch.tensor([len(sample) for sample in x])


def offsets(x: Tensor) -> Tensor:
    found = torch.zeros(3, dtype=torch.int32)
    for i in range(2):
        found[i + 1] = found[i] + lengths(x)[i]
    return found


def written_through_a_view(x: Tensor) -> Tensor:
    found = torch.zeros(3)
    found[1:].copy_(x[0, :2])
    return found


def returned_elsewhere(x: Tensor) -> Tensor:
    found = torch.zeros(2)
    torch.add(x[0, :2], 1, out=found)
    return found


def added_to(x: Tensor) -> Tensor:
    found = torch.zeros(2)
    found += x[0, :2]
    return found


KNOWN: tuple[Callable[[Tensor], Tensor], ...] = (
    lengths, offsets, lambda x: torch.stack([torch.tensor(x.shape)] * 2).max(dim=0).values, lambda x: x.new_tensor([1, 2]).cumsum(0),
    lambda x: lengths(x)[: lengths(x)[0] - 2],
)  # fmt: skip
UNKNOWN: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x, lambda x: x.argmax(dim=0), lambda x: torch.rand(2), lambda x: torch.rand_like(x.new_ones(2)), written_through_a_view,
    returned_elsewhere, added_to, lambda x: torch.ops.aten.neg(lengths(x)),
)  # fmt: skip


@pytest.mark.parametrize("make", KNOWN)
def test_what_follows_from_shapes_is_known(make: Callable[[Tensor], Tensor]) -> None:
    with KnownValues() as known:
        made = make(torch.randn(2, 3))
    assert torch.equal(known.value(made), made)


@pytest.mark.parametrize("make", UNKNOWN)
def test_what_depends_on_inputs_or_chance_is_not(make: Callable[[Tensor], Tensor]) -> None:
    with KnownValues() as known:
        made = make(torch.randn(2, 3))
    assert known.value(made) is None


class Grids(OneStream):
    """The grid travels as a tensor, and is read at the end."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        grid = torch.stack([torch.tensor(sample.shape[:1]) for sample in x])
        assert grid.numpy().max() <= 16
        rows = super().forward(x, t)
        return torch.stack([row[:length] for row, (length,) in zip(rows, grid.tolist(), strict=True)])


def test_a_second_size_has_a_program_of_its_own_where_open_sizes_cannot_be_traced() -> None:
    model: nn.Module = Grids().eval().requires_grad_(False)
    cached = bw.transform(model, bw.CacheConfig(threshold=0, num_steps=2))
    for rows in (6, 5):
        x, t = torch.randn(2, rows, 4), torch.tensor([0.5, 0.5])
        with torch.no_grad():
            assert torch.equal(cached(x, t), model(x, t))
    assert len(cached.cached_programs) == 2
    assert any("each size is captured separately" in note for note in cached.plan.notes)


def test_a_capture_leaves_no_marks_on_what_it_is_given() -> None:
    x, t = torch.randn(2, 6, 4), torch.tensor([0.5, 0.5])
    with pytest.raises(bw.CaptureError):
        capture(Grids().eval(), (x, t), {}, "auto")
    assert not vars(x)


class Lengths(OneStream):
    """Cuts the text at the lengths that a mask tells, and attends to what is left; a buffer says how often."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Linear(3, 8)
        self.register_buffer("times", torch.tensor([2]))

    def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        ends = torch.zeros(len(mask) + 1, dtype=torch.int64)
        for i in range(len(mask)):
            ends[i + 1] = ends[i] + mask[i].sum()
        packed = self.words(text).masked_select(mask.unsqueeze(-1).bool()).view(1, 1, -1, 8)
        packed = functional.scaled_dot_product_attention(packed, packed, packed, torch.zeros([int(mask.sum())] * 2))[0, 0]
        assert max(mask.sum(dim=1).tolist()) <= len(packed)
        means = torch.stack([packed[ends[i] : ends[i + 1]].mean(dim=0) for i in range(len(mask))])
        h, c = self.patch(x), self.embed(t) + means.unsqueeze(1) * int(self.times)
        for block in self.blocks:
            h = block(h, c)
        return self.head(h)


def call(step: int, *lengths: int) -> tuple[Tensor, ...]:
    mask = (torch.arange(5) < torch.tensor(lengths).unsqueeze(1)).long()
    return *OneStream().example(batch=2, step=step), torch.linspace(0, 1, 30).view(2, 5, 3), mask


@torch.no_grad()
def check(cached: nn.Module, model: nn.Module, *inputs: Tensor) -> None:
    assert torch.equal(cached(*inputs), model(*inputs))


@pytest.fixture(scope="module")
def lengths_model() -> Lengths:
    return Lengths().eval().requires_grad_(False)


def test_masks_that_python_reads_have_programs_of_their_own(lengths_model: Lengths) -> None:
    cached = bw.transform(lengths_model, bw.CacheConfig(threshold=0, num_steps=2))
    for step, lengths in ((0, (3, 5)), (1, (3, 5)), (0, (2, 4)), (1, (2, 4)), (0, (3, 5)), (1, (3, 5))):
        check(cached, lengths_model, *call(step, *lengths))
    assert cached.report().captures == 2
    (note,) = [
        note
        for note in cached.plan.notes
        if note.startswith("the values of mask are constants of the graph; other values are captured separately")
    ]
    assert re.search(r'read at test_known.py:\d+, in forward: "packed = .*masked_select', note)
    lengths_model.times.add_(1)
    check(cached, lengths_model, *call(0, 3, 5))
    assert cached.report().captures == 3


class Packed(OneStream):
    """Gives the blocks only the tokens that a mask keeps, or those whose first channel is positive."""

    def __init__(self, masked: bool = True) -> None:
        super().__init__(depth=2)
        self.masked = masked

    def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        kept = mask if self.masked else x[0, :, 0] > 0
        out = torch.zeros_like(x)
        out[:, kept] = super().forward(x[:, kept], t)
        return out + x[0, kept, :1].sum() + x[0, kept, 0].sum()


def packed(step: int, *kept: int) -> tuple[Tensor, ...]:
    return *OneStream().example(step=step), (torch.arange(6).unsqueeze(1) == torch.tensor(kept)).any(dim=1)


def test_blocks_may_take_as_many_tokens_as_a_mask_says() -> None:
    model = Packed().eval().requires_grad_(False)
    cached = bw.transform(model, bw.CacheConfig(threshold=0, num_steps=2))
    for kept in ((0, 1, 2, 5), (1, 3), (0, 1, 2, 5)):
        for step in (0, 1):
            check(cached, model, *packed(step, *kept))
    assert cached.report().captures == 2
    assert any(
        note.startswith("the values of mask are constants of the graph; other values are captured separately (read at ")
        for note in cached.plan.notes
    )
    with pytest.raises(bw.UnsupportedGraphError, match=r"^Packed cannot be cached: .* has a size that depends on the values of a tensor"):
        bw.transform(Packed(masked=False).eval(), example_args=packed(0, 1))


class Counting(OneStream):
    def forward(self, x: Tensor, t: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x * sum(value == value for value in weights.tolist()), t)


def test_nan_is_a_value_like_any_other() -> None:
    model = Counting().eval()
    cached = bw.transform(model, bw.CacheConfig(num_steps=4, threshold=math.inf))
    with torch.no_grad():
        for step in range(3):
            cached(*model.example(step=step), torch.tensor([1.0, math.nan]))
    assert cached.report().captures == 1


def test_what_is_built_in_is_refused_elsewhere(lengths_model: Lengths, tmp_path: Path) -> None:
    config = bw.CacheConfig(policy="static", steps_mask=(0, 1, 1))
    cached = bw.transform(lengths_model, config, example_args=call(0, 3, 5))
    with torch.no_grad():
        cached(*call(0, 3, 5))
        with pytest.raises(bw.StateError, match=r"^the values of `mask` changed after step 0.*\n    at .*test_known.py:\d+, in forward"):
            cached(*call(1, 3, 4))
        cached.reset()
        cached(*call(0, 3, 4))


@pytest.mark.parametrize("form", ["onnx", pytest.param("pt2", marks=pytest.mark.slow)])
def test_a_bundle_knows_what_is_built_in(lengths_model: Lengths, form: str, tmp_path: Path) -> None:
    cached = bw.transform(lengths_model, bw.CacheConfig(num_steps=3, threshold=math.inf, reuse_interval=2, tail=0))
    manifest = bw.export(cached, tmp_path / "bundle", form, signature=(call(0, 3, 5), {}))
    assert manifest.values == (ValueEntry(input="mask", value=(1, 1, 1, 0, 0, 1, 1, 1, 1, 1)),)
    assert str(Path(__file__).parent) not in json.dumps(manifest.to_json())
    session = bw.load(tmp_path / "bundle", **({"backend": "torch", "allow_code": True} if form == "pt2" else {}))
    with torch.no_grad():
        for step in range(3):
            actual = torch.as_tensor(session(*call(step, 3, 5)))
            torch.testing.assert_close(actual, cached(*call(step, 3, 5)), rtol=0, atol=1e-5 if form == "onnx" else 0)
    assert str(session.report()) == str(cached.report())
    session.reset()
    with pytest.raises(bw.StateError, match=r"^the values of mask differ from those at export. The model reads them in Python"):
        session(*call(0, 3, 4))


def test_a_manifest_cannot_hold_every_value(tmp_path: Path) -> None:
    class Rated(OneStream):
        """Reads a rate in Python."""

        def forward(self, x: Tensor, t: Tensor, rate: Tensor) -> Tensor:
            return super().forward(x, t) if rate.tolist()[0] > 0 else x

    for rate in (torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([math.inf])):
        cached = bw.transform(Rated().eval(), bw.CacheConfig(num_steps=3), example_args=(*OneStream().example(), rate))
        with pytest.raises(
            bw.ExportError, match=r"^Rated reads the values of rate in Python, and a bundle cannot store these: (.|\n)*finite"
        ):
            bw.export(cached, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())
