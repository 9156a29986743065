"""Which input of a call is the time, and whether it went on since the last call. Needs no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Literal

from bwcache_compile.errors import StateError

HALF = ("float16", "bfloat16")
"""Dtypes in which neighboring times round to equal values."""

_LARGEST = 4096
"""Elements of the largest input that may be the time."""
_COARSE = 2.0**-8
"""Relative step between neighboring bfloat16 values."""
_ATTEMPTS = 16
"""Calls after which an input that has not moved is no longer read in search of the time."""


def may_be_time(shape: Sequence[int], dtype: str) -> bool:
    """Whether an input of this shape and dtype may be the time."""
    return len(shape) <= 2 and math.prod(shape) <= _LARGEST and dtype != "bool" and not dtype.startswith("complex")


@dataclasses.dataclass(frozen=True)
class TimeInput:
    """An input of a call that may be the time: a number, a vector or a matrix.

    Attributes:
        rank: 0, 1 or 2.
        half: Whether its dtype is one of `HALF`.
        read: Copies its values to the host. Waits for the device if they are on one.
    """

    rank: int
    half: bool
    read: Callable[[], Sequence[float]]

    def sample(self) -> _Sample:
        """Read the values."""
        return _Sample(self.rank, self.half, tuple(self.read()))


@dataclasses.dataclass(frozen=True)
class _Sample:
    rank: int
    half: bool
    values: tuple[float, ...]

    @property
    def is_mask(self) -> bool:
        return self.rank == 2 and all(value in (0, 1) for value in self.values)

    @property
    def is_uniform(self) -> bool:
        return bool(self.values) and all(value == self.values[0] for value in self.values)


def _compare(old: _Sample, new: _Sample) -> tuple[bool, int]:
    """Return whether two samples are equal, and 1 or -1 where every difference rises or falls, else 0.

    Two prompts' embeddings differ both ways. Their masks may not, but hold nothing but 0 and 1.
    """
    if old.rank != new.rank or len(old.values) != len(new.values):
        return False, 0
    slack = _COARSE if old.half != new.half else 0.0  # the dtype changed: differences below its rounding mean nothing
    rises = falls = False
    for a, b in zip(old.values, new.values, strict=True):
        least = slack * max(abs(a), abs(b))
        rises, falls = rises or b - a > least, falls or a - b > least
    sign = 0 if old.is_mask and new.is_mask else int(rises) - int(falls)
    return not rises and not falls, sign


_SAME_TIME = 1e-2
"""Relative difference of times that are taken for equal: one in bfloat16 is off by 4e-3."""


def check_time(step: int, expected: Sequence[float | None], inputs: Iterable[TimeInput]) -> None:
    """Refuse a step at another time than the one that weights were calibrated for.

    Args:
        step: Index of the step.
        expected: The time at each step; None where another model ran.
        inputs: Inputs that may be the time; one of them must be the expected one.

    Raises:
        StateError: None is.
    """
    found = [values for values in (tuple(value.read()) for value in inputs if value.rank < 2) if values]
    want = expected[step]
    if want is None:
        own = [at for at, time in enumerate(expected) if time is not None]
        raise StateError(
            f"these settings were calibrated for a model that runs at steps {own[0]} to {own[-1]} of {len(expected)}, but it was called at"
            f" step {step}. Calibrate with this boundary between the models, or set weights=None and timesteps=None."
        )
    if found and not any(abs(max(values) - want) <= _SAME_TIME * max(abs(want), abs(max(values))) for values in found):
        raise StateError(
            f"these settings were calibrated for timestep {want:g} at step {step}, but this call has timestep {max(found[0]):g}. Calibrate"
            " with this scheduler and this number of steps, or set weights=None and timesteps=None."
        )


Verdict = Literal["none", "forward", "back", "repeated", "unsure"]
"""What the inputs say of the time: nothing; it went on; it went against the run; it is the one before; it may be."""


@dataclasses.dataclass(frozen=True)
class Clock:
    """Learns which input is the time from the first calls that differ, and which way it goes.

    The time is an input of rank 2 or less whose values all rise or all fall from one step to the next. Once it is
    known, it alone is read.

    Attributes:
        samples: Last values of the inputs that may be the time.
        signs: Inputs that are the time, with their direction, also from earlier generations. Empty while none has moved.
        moved: Whether the time went on in this generation, and in one dtype since then.
        against: Generations in a row whose second call went against the direction; after two, the direction is the other one.
        attempts: Calls at which nothing moved.
        doubt: Whether an equal time in half precision, in calls without a context name, may have been a second call of one step.
        moves: Calls in a row at which the time went on since then.
    """

    samples: Mapping[Hashable, _Sample] = dataclasses.field(default_factory=dict)
    signs: Mapping[Hashable, int] = dataclasses.field(default_factory=dict)
    moved: bool = False
    against: int = 0
    attempts: int = 0
    doubt: bool = False
    moves: int = 0

    @staticmethod
    def start(inputs: Mapping[Hashable, TimeInput]) -> Clock:
        """Return the clock after the first call of a generation."""
        return Clock({key: value.sample() for key, value in inputs.items()})

    def restart(self, inputs: Mapping[Hashable, TimeInput], against: bool) -> Clock:
        """Return the clock after the first call of another generation of such inputs; the direction is kept.

        Args:
            inputs: Of the call.
            against: Whether the last generation had one call, and this one went against the direction.
        """
        signs, count = {key: sign for key, sign in self.signs.items() if key in inputs}, self.against + 1 if against else 0
        if count == 2:
            signs, count = {key: -sign for key, sign in signs.items()}, 0
        return dataclasses.replace(Clock.start(inputs), signs=signs, against=count)

    def observe(self, inputs: Mapping[Hashable, TimeInput]) -> tuple[Clock, Verdict]:
        """Return the clock after one more call, and what that call's inputs say of the time."""
        if self.attempts >= _ATTEMPTS:
            return self, "none"
        keys = [key for key in (self.signs or self.samples) if key in inputs]
        samples = {key: inputs[key].sample() for key in keys}
        compared = {key: _compare(self.samples[key], samples[key]) for key in keys}
        signs = {key: sign for key, (_, sign) in compared.items() if sign}
        if not self.signs:
            verdict = "forward" if signs else _unmoved(samples, compared)
            attempts = self.attempts + (verdict in ("none", "repeated"))
            return dataclasses.replace(self, samples=samples, signs=signs, moved=bool(signs), attempts=attempts), verdict
        onward = {key: sign for key, sign in signs.items() if sign == self.signs[key]}
        if onward:  # what went the other way meanwhile is not the time
            lasting = {key: sign for key, sign in self.signs.items() if key in onward or key not in signs}
            return dataclasses.replace(self, samples=samples, signs=lasting, moved=True, against=0), "forward"
        half = any(sample.half for sample in samples.values())
        recast = any(sample.half != self.samples[key].half for key, sample in samples.items())
        if not signs and recast:  # as near as rounding: a scheduler's cast after the first step, or the first step of another run
            return dataclasses.replace(self, samples=samples, moved=False), "unsure"
        return dataclasses.replace(self, samples=samples), "back" if signs else "unsure" if half else "repeated"

    def shows_time_of(self, other: Clock) -> bool:
        """Whether the inputs that are the time have the values that another clock saw last."""
        times = [(self.samples[key], other.samples.get(key)) for key in self.signs]
        return all(theirs is not None and _compare(mine, theirs)[0] for mine, theirs in times)

    def doubting(self, verdict: Verdict) -> Clock:
        """Return the clock of calls without a context name: after a repeated time two moves in a row end the doubt."""
        if verdict == "unsure" and (self.doubt or not self.moved):
            return dataclasses.replace(self, doubt=True, moves=0)
        moves = self.moves + 1 if verdict == "forward" else 0
        return dataclasses.replace(self, doubt=self.doubt and moves < 2, moves=moves)


def _unmoved(samples: Mapping[Hashable, _Sample], compared: Mapping[Hashable, tuple[bool, int]]) -> Verdict:
    """Say what two calls mean between which no input rose or fell as a whole.

    Where embeddings of rank 2 differ, the time may have come as one of them: only an unchanged vector of one value is
    proof then.
    """
    equal = [samples[key] for key, (same, _) in compared.items() if same]
    differ = [samples[key] for key, (same, _) in compared.items() if not same]
    if any(sample.rank < 2 for sample in differ):
        return "none"
    if any(sample.half for sample in equal):
        return "unsure"
    proof = [sample for sample in equal if not differ or (sample.rank < 2 and sample.is_uniform)]
    return "repeated" if proof else "none"
