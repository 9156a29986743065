"""Transformer blocks from a description: norms, modulation, mixing, and the ways to add to a stream, in place or not."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 8


class Short:
    """Prints as the call that makes it, defaults left out."""

    def __repr__(self) -> str:
        fields = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in fields)})"


@dataclasses.dataclass(frozen=True, repr=False)
class Stack(Short):
    """Blocks of one kind, one after the other."""

    kind: str = "single"  # streams of a block: single (x), double (each stream), joint (concatenated), spacetime (x, in two layouts)
    depth: int = 2
    mixer: str = "mean"  # mean, softmax, sdpa
    residual: str = "sum"  # sum, iadd, rows, copy, scratch, post, none
    norm: str = "layer"  # layer, rms, float, autocast, none
    modulation: str = "scale"  # none, scale, adaln, table, decay
    constant: str = "none"  # none, factor, roll, row
    odd: str = "none"  # none, first, last
    own: bool = False  # an input for each block, made before the blocks
    skip: str = "none"  # none, add, cat
    hints: int = 0  # every k-th block is followed by a hint
    glue: str = "none"  # between blocks: none, scale, norm, linear
    rotary: bool = False  # halves rotated into fresh memory
    feed: bool = True  # a feed-forward after the mixing


class Weights:
    """Draws parameters in a fixed order."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape: int) -> nn.Parameter:
        drawn = torch.randn(shape, generator=self.generator) * (1.2 / shape[-1] ** 0.5)
        return nn.Parameter(drawn.to(self.dtype), requires_grad=False)


def block_weights(stack: Stack, index: int, streams: int, draw: Weights) -> dict[str, nn.Parameter]:
    made = {}
    for j in range(streams if stack.kind == "double" else 1):
        made |= {f"qkv{j}": draw(3 * WIDTH, WIDTH), f"out{j}": draw(WIDTH, WIDTH)}
        made |= {f"up{j}": draw(2 * WIDTH, WIDTH), f"down{j}": draw(WIDTH, 2 * WIDTH)}
        made |= {f"modulate{j}": draw(2 * WIDTH, WIDTH), f"table{j}": draw(2, WIDTH)}
    return made | {"cat": draw(WIDTH, 2 * WIDTH), "extra": draw(WIDTH, WIDTH), "cross": draw(WIDTH, WIDTH)}


def normed(x: Tensor, how: str) -> Tensor:
    if how == "layer":
        return functional.layer_norm(x, (WIDTH,))
    if how == "rms":
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    if how == "float":
        return functional.layer_norm(x.float(), (WIDTH,)).type_as(x)
    if how == "autocast":
        with torch.autocast("cpu", enabled=False):
            return functional.layer_norm(x, (WIDTH,))
    return x


def modulated(h: Tensor, temb: Tensor, how: str, w: dict[str, Any], j: int) -> tuple[Tensor, Tensor | None]:
    """Return the modulated value and its gate, if it has one."""
    if how in ("scale", "decay"):
        return h * (1 + temb.unsqueeze(1)), None
    if how == "adaln":
        scale, gate = functional.linear(functional.silu(temb), w[f"modulate{j}"]).unsqueeze(1).chunk(2, dim=-1)
        return h * (1 + scale), 1 + gate
    if how == "table":
        scale, gate = (w[f"table{j}"] + temb.unsqueeze(1)).unbind(1)
        return h * (1 + scale.unsqueeze(1)), 1 + gate.unsqueeze(1)
    return h, None


def rotated(x: Tensor) -> Tensor:
    result = torch.empty_like(x)
    result[..., 0::2] = -x[..., 1::2]
    result[..., 1::2] = x[..., 0::2]
    return result


def together(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def apart(h: Tensor, sizes: list[int]) -> list[Tensor]:
    return [h] if len(sizes) == 1 else list(h.split(sizes, dim=1))


def mixed(h: Tensor, stack: Stack, w: dict[str, Any], parts: list[int]) -> Tensor:
    """Let the tokens of all streams, joined in `h`, look at one another; each part has projections of its own."""
    qkv = together([functional.linear(p, w[f"qkv{j}"]) for j, p in enumerate(apart(h, parts))])
    if stack.norm == "none":  # nothing else keeps the products below from overflowing after a few blocks
        qkv = torch.tanh(qkv)
    q, k, v = qkv.unflatten(2, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
    if stack.rotary:
        q, k = rotated(q), rotated(k)
    if stack.mixer == "mean":
        mixed = (q * k).mean(2, keepdim=True) + v
    elif stack.mixer == "sdpa":
        mixed = functional.scaled_dot_product_attention(q, k, v)
    else:
        mixed = torch.softmax(q @ k.transpose(-1, -2) / 2, dim=-1) @ v
    return mixed.transpose(1, 2).flatten(2)


def added(x: Tensor, h: Tensor, how: str, scratch: Tensor | None) -> Tensor:
    if how == "iadd":
        x += h
        return x
    if how == "rows":
        x[:, :1] += h[:, :1]
        x[:, 1:] = x[:, 1:] + h[:, 1:]
        return x
    if how == "copy":
        return x.copy_(x + h)
    if how == "scratch" and scratch is not None and scratch.shape == h.shape:
        scratch.copy_(h)
        return x + scratch
    if how == "post":
        return functional.layer_norm(x + h, (WIDTH,))
    return h if how == "none" else x + h


def run_block(
    stack: Stack, index: int, w: Any, streams: list[Tensor], temb: Tensor, own: Tensor | None, skip: Tensor | None, scratch: Tensor | None
) -> list[Tensor]:
    """Run a block: skip and per-block input in, mixing over all streams, then a feed-forward for each stream."""
    streams, last = list(streams), stack.odd == "last" and index == stack.depth - 1
    if stack.odd == "first" and index == 0:
        streams[0] = functional.linear(streams[0], w["extra"])
    if skip is not None:
        joined = torch.cat([streams[0], skip], dim=-1)
        streams[0] = streams[0] + skip if stack.skip == "add" else functional.linear(joined, w["cat"])
    if own is not None:
        streams[0] = streams[0] + functional.linear(own, w["cross"])
    if stack.modulation == "decay":
        temb.mul_(0.75)
    pairs = [modulated(normed(x, stack.norm), temb, stack.modulation, w, j) for j, x in enumerate(streams)]
    sizes = [x.shape[1] for x in streams]
    h = mixed(together([h for h, _ in pairs]), stack, w, sizes)
    if stack.constant == "factor":
        h = h * (1 + index / 4)
    if stack.constant == "roll":
        h = torch.roll(h, index, dims=1)
    if stack.constant == "row":
        h = h + h[:, index % 2 : index % 2 + 1]
    done = []
    for j, (x, part, (_, gate)) in enumerate(zip(streams, apart(h, sizes), pairs, strict=True)):
        if last and j > 0:  # the last block has no use for the other streams
            done.append(x)
            continue
        part = functional.linear(part, w[f"out{j}"])
        x = added(x, part if gate is None else part * gate, stack.residual, scratch)
        if stack.feed and not (last and len(streams) == 1):
            h = functional.gelu(functional.linear(normed(x, stack.norm), w[f"up{j}"]))
            x = added(x, functional.linear(h, w[f"down{j}"]), stack.residual, scratch)
        done.append(x)
    return done


class Block(nn.Module):
    """`run_block` as a module."""

    def __init__(self, stack: Stack, index: int, weights: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.stack, self.index, self.weights = stack, index, nn.ParameterDict(weights)

    def forward(self, *args: Any) -> list[Tensor]:
        return run_block(self.stack, self.index, self.weights, *args)
