"""Residual reuse where a long skip brings an early block's output back into a late one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.nn import functional as F

import bwcache_compile as bw
from tests.passes.helpers import folded

REUSES_SECOND: dict[str, Any] = {"policy": "static", "steps_mask": (0, 1, 0)}


class Block(nn.Module):
    """A residual block; a late one takes an early one's output too, merged as `how` says."""

    def __init__(self, width: int, how: str = "") -> None:
        super().__init__()
        self.how = how
        self.merge = nn.Linear(2 * width, width) if how else None
        self.merge_norm = nn.LayerNorm(2 * width if how == "norm first" else width) if "norm" in how else None
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def merged(self, x: Tensor, skip: Tensor) -> Tensor:
        both = torch.cat([skip, x] if self.how == "norm last" else [x, skip], dim=-1)
        if self.merge_norm is not None:
            return self.merge(self.merge_norm(both)) if self.how == "norm first" else self.merge_norm(self.merge(both))
        return x + self.merge(both) if self.how == "sum" else self.merge(both)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = self.merged(x, skip)
        q, k, v = self.qkv(self.norm(x)).unsqueeze(1).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + self.down(F.gelu(self.up(x)))


class Parts(nn.Module):
    """What runs before the blocks, the blocks, and what runs after them."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, width), nn.Linear(width, 4)

    def before(self, x: Tensor, t: Tensor) -> Tensor:
        return self.embed(x) + t

    def blocks(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.head(self.blocks(self.before(x, t)))


class UViT(Parts):
    """Blocks in, one in the middle, and blocks out, each of which takes the output of its counterpart."""

    def __init__(self, how: str, width: int = 16) -> None:
        super().__init__(width)
        self.into = nn.ModuleList(Block(width) for _ in range(2))
        self.middle = Block(width)
        self.out_of = nn.ModuleList(Block(width, how) for _ in range(2))

    def blocks(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.into:
            x = block(x)
            skips.append(x)
        x = self.middle(x)
        for block in self.out_of:
            x = block(x, skips.pop())
        return x


class TwoStreams(UViT):
    """The late blocks merge two streams, of which neither is made of the other."""

    def blocks(self, x: Tensor) -> Tensor:
        other, x = self.into[0](x.flip(1)), self.middle(self.into[1](x))
        for block in self.out_of:
            x = block(x, other)
        return x


class HDiT(Parts):
    """Two levels: the middle runs on a quarter of the tokens, and what it returns goes to the outer level as `how` says."""

    def __init__(self, how: str, width: int = 16) -> None:
        super().__init__(width)
        self.how = how
        self.down = nn.ModuleList(Block(width) for _ in range(2))
        self.merge, self.split = nn.Linear(4 * width, 2 * width), nn.Linear(2 * width, 4 * width)
        self.middle = nn.ModuleList(Block(2 * width) for _ in range(3))
        self.up = nn.ModuleList(Block(width) for _ in range(2))
        self.share = nn.Parameter(torch.full((1,), 0.5))

    def blocks(self, x: Tensor) -> Tensor:
        for block in self.down:
            x = block(x)
        tokens = self.merge(x.unflatten(1, (-1, 4)).flatten(2))
        for block in self.middle:
            tokens = block(tokens)
        tokens = self.split(tokens).unflatten(2, (4, -1)).flatten(1, 2)
        x = {"lerp": torch.lerp(x, tokens, self.share), "addcmul": torch.addcmul(x, tokens, self.share), "no skip": tokens}[self.how]
        for block in self.up:
            x = block(x)
        return x


def inputs(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(1, 12, 4, generator=generator), torch.tensor([1.0 - step / 4])


def made(model: Parts) -> Parts:
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return model.eval()


def refused(model: Parts) -> str:
    with pytest.raises(bw.ConfigError) as refusal, torch.no_grad():
        bw.transform(model, bw.CacheConfig(reuse="residual", **REUSES_SECOND))(*inputs(0))
    return folded(str(refusal.value))


@pytest.mark.parametrize("first", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(UViT("linear"), id="U-ViT"),
        pytest.param(UViT("norm first"), id="HunyuanDiT"),
        pytest.param(UViT("norm last"), id="Hunyuan3D"),
        pytest.param(UViT("sum"), id="a sum with what the linear layer returns"),
        pytest.param(HDiT("lerp"), id="HDiT"),
        pytest.param(HDiT("addcmul"), id="levels with a gated sum"),
    ],
)
def test_a_residual_is_added_to_the_stream_of_this_step(model: Parts, first: int) -> None:
    made(model)
    cached = bw.transform(model, bw.CacheConfig(reuse="residual", compute_first=first, **REUSES_SECOND))
    entered: list[Tensor] = []
    with torch.no_grad():
        outputs = [cached(*inputs(step)) for step in range(3)]
        start = list(model.children())[2][first // 2]
        hook = start.register_forward_hook(lambda _, args, output: entered.append(output if first else args[0]))
        _, computed = (model(*inputs(step)) for step in range(2))
        hook.remove()
        then, now = entered
        assert torch.equal(outputs[0], model(*inputs(0)))
        assert torch.equal(outputs[1], model.head(now + (model.blocks(model.before(*inputs(0))) - then)))
        assert not torch.equal(outputs[1], computed)
        assert torch.equal(outputs[2], model(*inputs(2)))
    assert len(cached.plan.blocks) == (5 if isinstance(model, UViT) else 7) - first


def test_two_streams_that_a_linear_layer_merges_are_both_named() -> None:
    assert_expected_inline(
        refused(made(TwoStreams("linear"))),
        """\
reuse='residual' does not fit TwoStreams: it requires that each output of the blocks be an input of the blocks plus a
change, and for `add_10` f32[1, 12, 16] no such input was found (inputs: add_4 f32[1, 12, 16], add_2 f32[1, 12, 16]).
  Followed back through sums and re-arrangements, its residual path ends at `linear_13` of out_of.0.merge, which merges
`add_6` and `add_2`, none computed from another.
  Use reuse='output' or 'taylor'.""",
    )


def test_levels_without_a_skip_are_held() -> None:
    model = made(HDiT("no skip"))
    assert_expected_inline(
        refused(model),
        """\
reuse='residual' does not fit HDiT: it requires that each output of the blocks be an input of the blocks plus a change,
and for `add_14` f32[1, 12, 16] no such input was found (inputs: add f32[1, 12, 16]).
  Followed back through sums and re-arrangements, its residual path ends at `linear_22` of split.
  Use reuse='output' or 'taylor'.""",
    )
    cached = bw.transform(model, bw.CacheConfig(**REUSES_SECOND))
    with torch.no_grad():
        outputs = [cached(*inputs(step)) for step in range(3)]
        assert torch.equal(outputs[0], model(*inputs(0)))
        assert torch.equal(outputs[1], outputs[0])
        assert torch.equal(outputs[2], model(*inputs(2)))
    assert len(cached.plan.blocks) == 7
