"""The tensors of the cache state that a region needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import SymInt, Tensor
from torch.fx import Node

from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import ConfigError
from bwcache_compile.ir.edit import size_values
from bwcache_compile.ir.layout import Order, slot_order
from bwcache_compile.ir.plan import CacheSlot, IndicatorProbe, Region
from bwcache_compile.ir.program import ModelProgram
from bwcache_compile.ir.samples import check_samples
from bwcache_compile.ir.sizes import hint, size_of
from bwcache_compile.policies import POLICIES, SmallSlot
from bwcache_compile.policies.sampling import sampled_of_part
from bwcache_compile.size_expressions import evaluated, largest


def _slot(
    name: str, role: str, shape: Iterable[int | SymInt], dtype: torch.dtype, fill: float = 0, order: Order | None = None
) -> CacheSlot:
    sizes = list(shape)
    return CacheSlot(name, role, tuple(map(size_of, sizes)), dtype, tuple(map(hint, sizes)), order or tuple(range(len(sizes))), fill)


def own_tokens(shape: Sequence[int | SymInt], measured: IndicatorProbe, index: int) -> Tensor | None:
    """Return which rows of a feature this rank measures, where the ranks hold parts of the tokens; None where each chooses alone.

    Args:
        shape: Of the feature: batch, this rank's tokens, channels.
        measured: What is measured, by a stride.
        index: Position among the measured features.

    Raises:
        ConfigError: A size is open.
    """
    ranks, stride = measured.ranks, measured.stride
    if ranks is None or ranks.parts == 1:
        return None
    assert stride is not None
    batch, tokens = shape[0] if len(shape) > 2 else 1, math.prod(shape[1:-1] if len(shape) > 2 else shape[:-1])
    if not isinstance(batch, int) or not isinstance(tokens, int):
        raise ConfigError(
            f"indicator_tokens={stride} with sequence_group chooses among the tokens of all ranks, which takes fixed sizes. Leave out"
            ' dynamic_shapes, or set indicator_tokens="all".'
        )
    return sampled_of_part(batch, tokens, stride, index, ranks.parts, ranks.part)


def _reference_slot(
    program: ModelProgram, name: str, measured: IndicatorProbe, value: Tensor, index: int, samples: int | SymInt | None
) -> CacheSlot:
    shape: list[int | SymInt] = list(value.shape)
    if measured.token_range is not None:
        start, stop = evaluated(measured.token_range, size_values(program))
        shape[1] = stop - start
    if measured.stride is not None:
        rows, own = math.prod(shape[:-1]), own_tokens(shape, measured, index)
        if own is not None:
            shape = [len(own), shape[-1]]
        elif samples is None:
            shape = [largest(1, rows // measured.stride), shape[-1]]
        else:
            shape = [samples, largest(1, rows // samples // measured.stride), shape[-1]]
    return _slot(name, "reference", shape, value.dtype)


def region_slots(program: ModelProgram, config: CacheConfig, region: Region, nodes: dict[str, Node]) -> tuple[CacheSlot, ...]:
    """Return what is kept for a region: what the way of reusing keeps of each output, the indicator's references, and the policy's own.

    With `batch_reduce="per_sample"` each slot holds, along dimension 0, what is kept for one sample after the other.

    Raises:
        UnsupportedGraphError: The samples of a batch are to be told apart, and do not lie along dimension 0.
    """
    values, samples = [nodes[name].meta["val"] for name in region.outputs], None
    if config.batch_reduce != "joint":
        kept = region.outputs if config.batch_reduce == "per_sample" else ()
        samples = check_samples(program, [nodes[name] for name in (*kept, *(m.node for m in region.measured))], config.batch_reduce)
    repeated = samples if samples is not None and config.batch_reduce == "per_sample" else 1

    def like_output(i: int, value: Tensor, role: str) -> CacheSlot:
        return _slot(region.slot(role, i), role, value.shape, value.dtype, order=slot_order(value))

    def small(slot: SmallSlot) -> CacheSlot:
        shape = (slot.shape[0] * repeated, *slot.shape[1:])
        return _slot(region.slot(slot.name), slot.name, shape, getattr(torch, slot.dtype), slot.fill)

    way, policy = config.graph_settings.way, POLICIES[config.policy]
    slots = [like_output(i, value, kind) for kind in way.slots for i, value in enumerate(values)]
    slots += map(small, way.shared)
    for i, m in enumerate(region.measured):
        slots.append(_reference_slot(program, region.slot("reference", i), m, nodes[m.node].meta["val"], i, samples))
    return (*slots, *map(small, policy.slots))
