"""What moves in a denoising loop over the example inputs of any model: the latents by Euler steps, the time downwards. Needs no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from bwcache_compile.clock import may_be_time

_TIMES = ("timestep", "timesteps", "time", "times", "t", "ts", "step", "sigma", "sigmas", "noise_level")
_FULL_TIME = 999.0


@dataclasses.dataclass(frozen=True)
class Input:
    """A tensor of a call: its dtype as numpy names it, and its first number if it is short."""

    shape: tuple[int, ...]
    dtype: str
    first: float = 0.0


@dataclasses.dataclass(frozen=True)
class Motion:
    """What changes from step to step of a call.

    Attributes:
        latents: The input that the outputs are steps of; None where there is none.
        part: The part of it that an output has values for, and the part of the output that is used.
        time: The input that is the time; None where there is none.
        times: Its value at each step.
    """

    latents: str | None
    part: tuple[slice, ...]
    time: str | None
    times: tuple[float, ...]

    def __str__(self) -> str:
        """Say what moves."""
        moving = [f"the input {self.latents} moves by Euler steps"] if self.latents else ["no input has the output's shape"]
        return ", ".join(
            [*moving, f"the time {self.time} runs from {self.times[0]:g} to {self.times[-1]:g}" if self.time else "no input is the time"]
        )

    def advanced(self, latents: Any, output: Any) -> Any:
        """Return the latents after one step of equal length: a tensor or an array, as they were given."""
        moved = latents.clone() if hasattr(latents, "clone") else latents.copy()
        moved[self.part] = latents[self.part] - output[self.part] / len(self.times)
        return moved


def _overlap(shape: Sequence[int], output: Sequence[int]) -> tuple[slice, ...] | None:
    """Return what an input and an output of one rank have in common, if they differ in one dimension at most."""
    if len(shape) != len(output) or len(shape) < 2 or sum(a != b for a, b in zip(shape, output, strict=True)) > 1:
        return None
    return tuple(slice(0, min(a, b)) for a, b in zip(shape, output, strict=True))


def motion(inputs: Mapping[str, Input], output: Sequence[int], steps: int) -> Motion:
    """Find the latents and the time among a call's inputs.

    The latents are the floating input with the output's shape, or with another size in one dimension alone: of several, the one that is
    nearest. The time is a short input that is called so, else the first short one that is a floating number per sample.
    """
    found: list[tuple[int, int, str, tuple[slice, ...]]] = []
    for i, (name, value) in enumerate(inputs.items()):
        part = _overlap(value.shape, output) if value.dtype.startswith(("float", "bfloat")) else None
        if part is not None:
            found.append((abs(math.prod(value.shape) - math.prod(output)), i, name, part))
    _, _, latents, part = min(found, default=(0, 0, None, ()), key=lambda item: item[:2])
    short = {name: value for name, value in inputs.items() if may_be_time(value.shape, value.dtype) and name != latents}
    named = [name for name in short if name.rpartition(".")[2] in _TIMES]
    others = [name for name, value in short.items() if value.dtype.startswith("float") and len(value.shape) < 2]
    time = next(iter([*named, *others]), None)
    start = 1.0
    if time is not None:
        whole = not short[time].dtype.startswith(("float", "bfloat"))
        start = short[time].first if short[time].first > 0 else 1.0
        start = _FULL_TIME if whole and start < steps else start
    return Motion(latents, part, time, tuple(start * (1 - i / steps) for i in range(steps)))
