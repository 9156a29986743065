"""Which blocks are measured, and which tokens of their features, for every indicator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from bwcache_compile.policies.arithmetic import quotient
from bwcache_compile.size_expressions import largest, smallest

if TYPE_CHECKING:
    import torch


def measured_blocks(blocks: int, wanted: int | Literal["all"]) -> list[int]:
    """Return the positions of the blocks that are measured: spread evenly, and ending with the last.

    Args:
        blocks: How many there are.
        wanted: `CacheConfig.indicator_blocks`.
    """
    count = blocks if wanted == "all" else min(wanted, blocks)
    return [-(-(i + 1) * blocks // count) - 1 for i in range(count)]


def sampled_tokens(count: int | torch.SymInt, stride: int, block: int, device: torch.device | None = None) -> torch.Tensor:
    """Choose one token in every stratum of `stride`, at a hashed place that differs from block to block.

    A plain stride aliases with the token grid. Letting each block look elsewhere makes the mean over blocks cover
    `blocks` times as many tokens for the same memory. A closed form, so that a graph of dynamic sizes can hold it too.

    Args:
        count: Tokens in all (batch times sequence).
        stride: Tokens per stratum.
        block: Position of the block among the measured ones.
        device: Where the places are wanted.

    Returns:
        int64[max(1, count // stride)], increasing, within [0, count).
    """
    import torch

    strata = torch.arange(largest(1, count // stride), device=device)
    width = smallest(stride, count)
    mixed = (strata + 7919 * block + 1) * 2654435761 % 2**32  # Knuth's multiplicative hash
    return strata * stride + quotient(mixed * width, 2**32)


def sampled_of_part(
    batch: int, tokens: int, stride: int, block: int, parts: int, part: int, device: torch.device | None = None
) -> torch.Tensor:
    """Return those of the tokens that `sampled_tokens` chooses of whole sequences which a rank holds.

    Args:
        batch: Sequences.
        tokens: Tokens of each sequence that a rank holds.
        stride: Tokens per stratum.
        block: Position of the block among the measured ones.
        parts: Ranks that hold a part of each sequence, in its order.
        part: Which of them is asked about.
        device: Where the places are wanted.

    Returns:
        int64, increasing, within [0, batch * tokens); it may be empty.
    """
    places = sampled_tokens(batch * tokens * parts, stride, block, device)
    within = places % (tokens * parts)
    mine = within // tokens == part
    return (places // (tokens * parts) * tokens + within % tokens)[mine]
