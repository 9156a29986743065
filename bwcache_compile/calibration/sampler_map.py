"""Recover a sampler's step from recorded generations: how the next latents follow from the last latents and outputs.

Between two deterministic generations of one prompt, the difference of the next latents is a linear combination, with one
scalar coefficient each, of the differences of the latents and of each output at this and the last few steps. That holds for
guidance and for multistep solvers alike, and neither needs to be known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from bwcache_compile.calibration.recording import RecordedStep

MAX_DEPTH = 3
TOLERANCE = 1e-3
"""Largest relative residual of a map that is taken for exact."""
_ENOUGH = 3.0
"""A depth is enough if its residual is at most this many times the smallest one."""
_ROUNDING = 1e-5
"""Residual that float32 arithmetic leaves."""
_EQUATIONS = 2**16
"""Elements whose equations are solved for the coefficients; there are at most a few dozen of these."""

Column = tuple[int, str, int]
"""A term of the map: steps back, context ("" for the latents), and piece of that context's output."""


@dataclasses.dataclass(frozen=True)
class SamplerMap:
    """The coefficients of a sampler's steps.

    Attributes:
        depth: Steps before the current one that a step depends on.
        coefficients: For each step, the coefficient of each term; empty where nothing differed.
        residuals: For each step, the part of the difference of the next latents that is not explained, relative to it.
        explained: Whether every residual is within the tolerance, or within the rounding of the latents' dtype.
    """

    depth: int
    coefficients: tuple[dict[Column, float], ...]
    residuals: tuple[float, ...]
    explained: bool

    @property
    def residual(self) -> float:
        """The largest residual."""
        return max(self.residuals, default=0.0)

    def known(self, run: Sequence[RecordedStep], full: Sequence[RecordedStep], step: int) -> Tensor:
        """Return the part of the next latents' difference that follows from what came before the outputs of a step.

        Args:
            run: The generation so far; the latents of `step` are its last record.
            full: The generation in which every step was computed.
            step: The current step.
        """
        total = torch.zeros_like(_wide(full[step].moving))
        for (back, key, piece), value in self.coefficients[step].items():
            if key == "" or back > 0:
                total += value * difference(run, full, step - back, key, piece)
        return total

    def output_coefficients(self, step: int) -> dict[tuple[str, int], float]:
        """Return the coefficient of each piece of each context's output at the current step."""
        return {(key, piece): value for (back, key, piece), value in self.coefficients[step].items() if back == 0 and key}


def _wide(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "the latents were recorded"
    return tensor.double()


def difference(run: Sequence[RecordedStep], full: Sequence[RecordedStep], step: int, key: str, piece: int) -> Tensor:
    """Return how the latents (key "") or a piece of an output differ from the full generation's at a step."""
    if not key:
        return _wide(run[step].moving) - _wide(full[step].moving)
    ours, theirs = run[step].outputs.get(key), full[step].outputs.get(key)
    if ours is None or theirs is None:
        return torch.zeros_like(_wide(full[step].moving))
    return ours[piece].double() - theirs[piece].double()


def _columns(full: Sequence[RecordedStep], step: int, depth: int) -> list[Column]:
    columns: list[Column] = []
    for back in range(min(depth, step) + 1):
        columns.append((back, "", 0))
        columns += [(back, key, piece) for key, pieces in full[step - back].outputs.items() for piece in range(len(pieces))]
    return columns


def _rounding(step: RecordedStep) -> float:
    """Return the norm of the rounding error that the dtype of the latents makes in their difference at a step."""
    assert step.moving is not None
    relative = torch.finfo(step.moving.dtype).eps / 12**0.5
    return float(relative * 2**0.5 * step.moving.double().norm())


def _solve(
    runs: Sequence[Sequence[RecordedStep]], full: Sequence[RecordedStep], step: int, depth: int
) -> tuple[dict[Column, float], float, bool]:
    """Return the coefficients of one step, the residual, and whether it is small enough."""
    columns = _columns(full, step, depth)
    stride = -(-_wide(full[step].moving).numel() // _EQUATIONS)
    target = torch.cat([difference(run, full, step + 1, "", 0)[::stride] for run in runs])
    size = target.norm()
    if size == 0:
        return {}, 0.0, True
    terms = [(column, torch.cat([difference(run, full, step - column[0], *column[1:])[::stride] for run in runs])) for column in columns]
    norms = {column: float(term.norm()) for column, term in terms}
    terms = [(column, term / norms[column]) for column, term in terms if norms[column] > 0]
    if not terms:
        return {}, 1.0, False
    matrix = torch.stack([term for _, term in terms], 1)
    solution = torch.linalg.lstsq(matrix, target[:, None] / size, rcond=1e-9, driver="gelsd").solution[:, 0]
    residual = float((matrix @ solution - target / size).norm())
    values = {column: float(value * size) / norms[column] for (column, _), value in zip(terms, solution, strict=True)}
    amplified = 1.0 + sum(value**2 for (_, key, _), value in values.items() if not key)
    rounding = _rounding(full[step + 1]) * (len(runs) / stride * amplified) ** 0.5 / float(size)
    return values, residual, residual < TOLERANCE + 2 * rounding


def recover_map(
    runs: Sequence[Sequence[RecordedStep]], full: Sequence[RecordedStep], depths: Sequence[int] = range(MAX_DEPTH + 1)
) -> SamplerMap:
    """Find the sampler's step from generations of one prompt with different reused steps.

    The least depth is chosen that explains the generations nearly as well as any other: where the differences are much alike,
    too small a depth explains these generations within the tolerance, but not others.

    Args:
        runs: Generations with reused steps.
        full: The generation in which every step was computed.
        depths: Depths to try, in this order.
    """
    found = []
    for depth in depths:
        solved = [_solve(runs, full, step, depth) for step in range(len(full) - 1)]
        coefficients, residuals, good = zip(*solved, strict=True)
        found.append(SamplerMap(depth, (*coefficients, {}), residuals, all(good)))
    enough = max(_ENOUGH * min(sampler.residual for sampler in found), _ROUNDING)
    return next(sampler for sampler in found if sampler.residual <= enough)


Origin = Literal["same", "noise", "model", "sampler"]


def first_difference(run: Sequence[RecordedStep], full: Sequence[RecordedStep], mask: Sequence[bool]) -> Origin:
    """Say what differs between two generations before the first reused step, which must be nothing.

    Returns:
        "same", "noise" (the first latents differ), "model" (equal latents, other outputs) or "sampler" (equal outputs, other
        latents next).
    """
    for step, computed in enumerate(mask):
        if _far(run[step].moving, full[step].moving):
            return "sampler" if step else "noise"
        if not computed:
            break
        for key, pieces in run[step].outputs.items():
            if any(_far(a, b) for a, b in zip(pieces, full[step].outputs.get(key, ()), strict=False)):
                return "model"
    return "same"


def _far(one: Tensor | None, other: Tensor | None) -> bool:
    """Return whether two tensors differ by more than kernels that sum in another order."""
    a, b = _wide(one), _wide(other)
    eps = torch.finfo(one.dtype).eps if one is not None else 0.0
    return float((a - b).norm()) > (4 * eps + 1e-5) * float(b.norm())
