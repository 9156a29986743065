"""Models that several ranks run together, and what each rank is given of the inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from tests.models import Block, OneStream, noise

DEPTH, TOKENS, WIDTH = 3, 12, 8


class AttentionBlock(Block):
    """Attends to the tokens of all ranks: keys and values are gathered."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + functional.scaled_dot_product_attention(q, self.gathered(k), self.gathered(v))
        return super().forward(x, temb)

    @staticmethod
    def gathered(local: Tensor) -> Tensor:
        if not dist.is_initialized():
            return local
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts, dim=1)


class Video(OneStream):
    """One stack of blocks that attend."""

    def __init__(self) -> None:
        super().__init__(DEPTH, WIDTH)
        self.blocks = nn.ModuleList(AttentionBlock(WIDTH) for _ in range(DEPTH))


def inputs(step: int, steps: int, name: str = "x") -> tuple[Tensor, Tensor]:
    """Return the whole inputs of a step."""
    return noise(name, step, 1, TOKENS, 4), torch.full((1,), 1 - step / steps)


Run = Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]
"""Calls the model on this rank's part of the inputs, and returns the whole output."""


def whole(model: nn.Module, args: tuple[Tensor, Tensor]) -> Tensor:
    """Every rank has all inputs."""
    return model(*args)


def by_tokens(model: nn.Module, args: tuple[Tensor, Tensor]) -> Tensor:
    """Each rank has some of the tokens."""
    x, t = args
    return AttentionBlock.gathered(model(x.chunk(dist.get_world_size(), dim=1)[dist.get_rank()].contiguous(), t))


def tensor_parallel(model: nn.Module) -> nn.Module:
    """Shard each block's linear layers: DTensor."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:  # type: ignore[union-attr]
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def fully_sharded(model: nn.Module) -> nn.Module:
    """Shard every parameter: FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def plain(model: nn.Module) -> nn.Module:
    """Leave the weights as they are."""
    return model


PARALLEL: dict[str, tuple[Callable[[nn.Module], nn.Module], Run]] = {
    "tokens": (plain, by_tokens),
    "tensor": (tensor_parallel, whole),
    "fsdp": (fully_sharded, whole),
}


class OneRank(OneStream):
    """Blocks without attention, so that nothing is gathered."""

    def __init__(self) -> None:
        super().__init__(DEPTH, WIDTH)


def model_of(kind: str) -> nn.Module:
    """Return the model for a kind of parallelism, with the same weights on every rank."""
    made: Any = Video() if kind == "tokens" else OneRank()
    return made.eval().requires_grad_(False)
