"""Models that several ranks run together, and what each rank is given of the inputs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from tests.models import Block, OneStream, noise

DEPTH, TOKENS, WIDTH, HEADS = 3, 48, 8, 4

Inputs = tuple[Tensor, ...]
Call = Callable[[nn.Module, Inputs], Tensor]
"""Calls the model on this rank's part of the inputs, and returns the whole output."""


def ranks() -> int:
    """Return how many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


class UlyssesBlock(Block):
    """Attends to all tokens with some of the heads: functional collectives change tokens for heads and back."""

    def __init__(self, width: int, group: Any = None) -> None:
        super().__init__(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.group, self.parts = group, group.size() if group is not None else ranks()

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3 * HEADS, -1)).unflatten(2, (3, HEADS))
        if self.parts > 1:
            qkv = self.exchanged(qkv.unflatten(3, (self.parts, -1)).movedim(3, 0)).movedim(0, 1).flatten(1, 2)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        if self.parts > 1:
            mixed = self.exchanged(mixed.unflatten(1, (self.parts, -1)).movedim(1, 0)).movedim(0, 2).flatten(2, 3)
        return super().forward(x + mixed.flatten(2), temb)

    def exchanged(self, parts: Tensor) -> Tensor:
        """Send each rank its part, and return what the ranks sent, in their order."""
        from torch.distributed._functional_collectives import all_to_all_single

        return all_to_all_single(parts.contiguous(), None, None, self.group or dist.group.WORLD)


class Ulysses(OneStream):
    """One stack of blocks that attend. The sequence is cut over a process group, that of all ranks if none is given."""

    def __init__(self, group: Any = None) -> None:
        super().__init__(DEPTH, WIDTH)
        self.blocks = nn.ModuleList(UlyssesBlock(WIDTH, group) for _ in range(DEPTH))


class ShardedBlock(Block):
    """Holds some of the features of the inner layer as plain tensors, and sums over the ranks."""

    def __init__(self, whole: Block) -> None:
        nn.Module.__init__(self)
        rank, share = dist.get_rank(), WIDTH // ranks()
        mine = slice(rank * share, (rank + 1) * share)
        self.up, self.down = nn.Linear(WIDTH, share), nn.Linear(share, WIDTH, bias=False)
        self.up.weight, self.up.bias = nn.Parameter(whole.up.weight[mine]), nn.Parameter(whole.up.bias[mine])
        self.down.weight, self.bias = nn.Parameter(whole.down.weight[:, mine]), whole.down.bias

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        from torch.distributed._functional_collectives import all_reduce

        return x + all_reduce(self.down(functional.gelu(self.up(x * temb))), "sum", dist.group.WORLD) + self.bias


def sharded(model: OneStream) -> OneStream:
    """Shard each block as Megatron does."""
    model.blocks = nn.ModuleList(ShardedBlock(block) for block in model.blocks)  # type: ignore[arg-type]
    return model


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


def wrapped_by_fsdp(model: nn.Module, keeps_names: bool) -> nn.Module:
    """Shard every parameter: FSDP1."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({Block})
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=keeps_names
    ).eval()  # which wraps in training mode


def wan() -> nn.Module:
    """Return a tiny Wan."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_layers": DEPTH, "num_attention_heads": 4, "attention_head_dim": 12, "text_dim": 8, "ffn_dim": 32}
    return WanTransformer3DModel(**sizes, in_channels=4, out_channels=4, freq_dim=32, patch_size=(1, 2, 2))


def attention_with_sums(
    ctx: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    **others: Any,
) -> Any:
    """Attend in plain torch, and return the logarithms of the sums too, from which the ring puts its parts together."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    out = (scores.softmax(-1) @ value).transpose(1, 2)
    return (out, scores.logsumexp(-1).transpose(1, 2)) if return_lse else out


def context_parallel(**degrees: int) -> Callable[[nn.Module], nn.Module]:
    """Return what puts the hooks of diffusers' context parallelism on a model."""

    def parallelized(model: Any) -> nn.Module:
        from diffusers import ContextParallelConfig

        if "ring_degree" in degrees:  # on the CPU diffusers has no attention for it; this process ends with the test
            mock.patch("diffusers.models.attention_dispatch._native_attention_forward_op", attention_with_sums).start()
        with mock.patch("torch.accelerator.device_count", return_value=1):  # diffusers divides by it, also on the CPU
            model.enable_parallelism(config=ContextParallelConfig(**{name: ranks() for name in degrees}))
        return model

    return parallelized


def inputs(step: int, steps: int, name: str = "x") -> Inputs:
    """Return the whole inputs of a step."""
    return noise(name, step, 1, TOKENS, 4), torch.full((1,), 1 - step / steps)


def wan_inputs(step: int, steps: int) -> Inputs:
    """Return the whole inputs of a step of Wan."""
    return noise("x", step, 1, 4, 2, 8, 8), torch.full((1,), 1000 * (1 - step / steps)), noise("text", 0, 1, 8, 8)


def whole(model: nn.Module, args: Inputs) -> Tensor:
    """Every rank has all inputs."""
    return model(*args)


def first(model: nn.Module, args: Inputs) -> Tensor:
    """Every rank has all inputs, and the model returns a tuple."""
    out: Tensor = model(*args, return_dict=False)[0]
    return getattr(out, "wait", lambda: out)()


def by_tokens(model: nn.Module, args: Inputs) -> Tensor:
    """Each rank has some of the tokens."""
    if ranks() == 1:
        return model(*args)
    x, t = args
    mine = model(x.chunk(ranks(), dim=1)[dist.get_rank()].contiguous(), t).contiguous()
    parts = [torch.empty_like(mine) for _ in range(ranks())]
    dist.all_gather(parts, mine)
    return torch.cat(parts, dim=1)


@dataclasses.dataclass(frozen=True)
class Kind:
    """One way of running a model on several ranks: how the model is made, parallelized and called."""

    make: Callable[[], nn.Module]
    parallelize: Callable[[Any], nn.Module]
    call: Call = whole
    inputs: Callable[[int, int], Inputs] = inputs

    def model(self) -> nn.Module:
        """Return the model, with the same weights on every rank."""
        made = self.make().eval().requires_grad_(False)
        return self.parallelize(made) if dist.is_initialized() else made


def one_stream() -> nn.Module:
    """Return blocks without attention, so that nothing is gathered."""
    return OneStream(DEPTH, WIDTH)


KINDS = {
    "ulysses": Kind(Ulysses, lambda model: model, by_tokens),
    "megatron": Kind(one_stream, sharded),
    "dtensor": Kind(one_stream, tensor_parallel),
    "fsdp": Kind(one_stream, fully_sharded),
    "fsdp1": Kind(one_stream, functools.partial(wrapped_by_fsdp, keeps_names=False)),
    "fsdp1_names": Kind(one_stream, functools.partial(wrapped_by_fsdp, keeps_names=True)),
    "wan_ulysses": Kind(wan, context_parallel(ulysses_degree=1), first, wan_inputs),
    "wan_ring": Kind(wan, context_parallel(ring_degree=1), first, wan_inputs),
}
