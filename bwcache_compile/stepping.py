"""Which step of which generation a call is, and whether it reuses. Needs no torch.

The cached model, the session of a bundle and the exporter's check are shells over the values in this file, and
`examples/aoti/stepping.hpp` mirrors it for C++. Everything here is immutable: a call that fails leaves nothing behind.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Literal

from bwcache_compile.errors import StateError

UNNAMED = "default"
"""Context of the calls that are made outside of every `cache_context`."""

HALF = ("float16", "bfloat16")
"""Dtypes in which neighboring times round to equal values."""

_LARGEST = 4096
"""Elements of the largest input that may be the time."""
_COARSE = 2.0**-8
"""Relative step between neighboring bfloat16 values."""
_ATTEMPTS = 16
"""Calls after which an input that has not moved is no longer read in search of the time."""


@dataclasses.dataclass(frozen=True)
class StepInfo:
    """What the caller said about a call.

    Attributes:
        context: Name of the stream of calls.
        step_index: Index of the denoising step, if the caller gave it.
        num_steps: Steps of this generation, if the caller gave them.
        named: False where the caller opened no context, so that calls can only be told apart by their order.
        group: Contexts of one group belong to one video; contexts of two groups share nothing, whatever their names.
    """

    context: str = UNNAMED
    step_index: int | None = None
    num_steps: int | None = None
    named: bool = True
    group: str = ""

    @property
    def key(self) -> str:
        """Name of the context among those of all groups."""
        return f"{self.group}/{self.context}" if self.group else self.context


@dataclasses.dataclass(frozen=True)
class Cursor:
    """Where a context is in its generation.

    Attributes:
        step: Index of the next step.
        computed_at: The last computed step, or -1.
        reuse_until: The last step that reuses; decided in the graph at `computed_at`.
    """

    step: int = 0
    computed_at: int = -1
    reuse_until: int = -1

    @property
    def reuses(self) -> bool:
        """Whether the next step reuses."""
        return 0 <= self.computed_at < self.step <= self.reuse_until

    def at(self, step: int) -> Cursor:
        """Return the cursor before another step."""
        return Cursor(step, self.computed_at, self.reuse_until)

    def computed(self, reuse_left: int) -> Cursor:
        """Return the cursor after the next step was computed, and `reuse_left` following steps may reuse it."""
        return Cursor(self.step + 1, self.step, self.step + reuse_left)

    def reused(self) -> Cursor:
        """Return the cursor after the next step was reused."""
        return self.at(self.step + 1)


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


Verdict = Literal["none", "forward", "back", "repeated", "unsure"]
"""What the inputs say of the time: nothing; it went on; it went against the run; it is the one before; it may be."""


_SAME_TIME = 1e-2
"""Relative difference of times that are taken for equal: one in bfloat16 is off by 4e-3."""


def check_time(step: int, expected: Sequence[float] | None, inputs: Iterable[TimeInput]) -> None:
    """Refuse a step at another time than the one that weights were calibrated for.

    Args:
        step: Index of the step.
        expected: The time at each step; None checks nothing.
        inputs: Inputs that may be the time; one of them must be the expected one.

    Raises:
        StateError: None is.
    """
    if expected is None:
        return
    found = [values for values in (tuple(value.read()) for value in inputs if value.rank < 2) if values]
    want = expected[step]
    if found and not any(abs(max(values) - want) <= _SAME_TIME * max(abs(want), abs(max(values))) for values in found):
        raise StateError(
            f"the weights were calibrated for time {want:g} at step {step}, but this run has {max(found[0]):g}. Calibrate with this"
            " scheduler and this number of steps, or set weights=None and timesteps=None."
        )


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


_UNREAD = Clock()
"""The clock of calls whose step the caller gives."""


@dataclasses.dataclass(frozen=True)
class Advance:
    """What a call is, decided before it runs.

    Attributes:
        step: Index of its step.
        began: Why it begins a new generation; empty if it continues one.
        cleared: Why nothing that is cached may be used although the generation goes on; empty if it may.
        event: What a report says of it; empty for what is expected.
        tracker: The context's tracker once the call has succeeded.
    """

    step: int
    began: str
    cleared: str
    event: str
    tracker: Tracker


@dataclasses.dataclass(frozen=True)
class Tracker:
    """The calls of one context so far: enough to tell which step of which generation the next one is.

    Attributes:
        next_step: Index of the step after the last one.
        started: Whether there was a call.
        signature: What the last call's inputs looked like.
        clock: What is known of the time. Only calls without a step index teach it.
        run: Number of the group's run that the last call belonged to; -1 before the first.
    """

    next_step: int = 0
    started: bool = False
    signature: Hashable = None
    clock: Clock = _UNREAD
    run: int = -1

    def advance(
        self,
        info: StepInfo,
        signature: Hashable,
        inputs: Mapping[Hashable, TimeInput],
        num_steps: int | None,
        latest: Tracker | None,
    ) -> Advance:
        """Decide which step a call is.

        A new generation begins, in this order of authority: at the first call, when the count of calls has reached
        `num_steps`, when the caller's step index goes back, when the inputs have another signature, and when the time
        goes against the direction of the run.

        Args:
            info: What the caller said about the call.
            signature: What the call's inputs look like: structure, shapes, dtypes, constants.
            inputs: Inputs that may be the time, read only where the caller gives no step index.
            num_steps: Steps of a generation, if known.
            latest: The tracker of the context of this group that was called last in the group's newest run; None if there is none.

        Raises:
            StateError: The step index is out of range, or two unnamed calls have the same time.
        """
        given = info.step_index
        if given is not None and (given < 0 or (num_steps is not None and given >= num_steps)):
            last = "" if num_steps is None else f" (0 .. {num_steps - 1})"
            steps = "unknown number of" if num_steps is None else num_steps
            raise StateError(f"step_index {given} is outside the {steps} steps of a generation{last}.")
        verdict: Verdict = "none"
        if given is not None:  # the caller knows better than the time, which need not be read
            clock = _UNREAD
        elif self.clock.samples and signature == self.signature:
            clock, verdict = self.clock.observe(inputs)
            clock = clock if info.named else clock.doubting(verdict)
        else:
            clock = Clock.start(inputs)
        began, event = self._began(info, signature, num_steps, verdict)
        if began and given is None:
            against = verdict == "back" and self.next_step == 1
            clock = self.clock.restart(inputs, against) if signature == self.signature else Clock.start(inputs)
        run = latest.run if latest else 0
        if began:
            step = given or 0
            return Advance(step, began, "", event, Tracker(step + 1, True, signature, clock, run + (self.run == run)))
        step = self.next_step if given is None else given
        following = Tracker(step + 1, True, signature, clock, self.run)
        joins = latest is not None and self.run != run and following.is_beside(latest)
        cleared = "another context of the group began a new run" if joins else _doubt(verdict, clock)
        event = f"{cleared} before step {step}: the cache was cleared" if cleared else ""
        return Advance(step, "", cleared, event, dataclasses.replace(following, run=run) if joins else following)

    def is_beside(self, other: Tracker) -> bool:
        """Whether two contexts were last called at the same step of one run, as far as step index or time can tell."""
        if self.clock.signs:
            times = [(self.clock.samples[key], other.clock.samples.get(key)) for key in self.clock.signs]
            return all(theirs is not None and _compare(mine, theirs)[0] for mine, theirs in times)
        return not other.clock.samples and self.next_step == other.next_step

    def _began(self, info: StepInfo, signature: Hashable, num_steps: int | None, verdict: Verdict) -> tuple[str, str]:
        """Return why a call begins a new generation, and what a report says of that; both empty if it does not."""
        given, following = info.step_index, self.next_step
        if not self.started:
            return "the first call", ""
        if num_steps is not None and given is None and following >= num_steps:
            went_on = verdict == "forward"
            advice = (
                f"the timestep continued after the last of {num_steps} steps: a new generation began. Set num_steps to the number of steps"
            )
            return f"the {num_steps} steps of the previous generation were complete", advice if went_on else ""
        if given is not None and given < following:
            again = 0 < given == following - 1
            advice = f"step {given} was repeated: a new generation began. If a step makes several calls, give each its own context"
            return "the step index went back", advice if again else ""
        if signature != self.signature:
            why = "the inputs changed"
        elif verdict == "back" or (verdict == "repeated" and following == 1 and info.named):
            why = "the timestep went back"
        elif verdict == "repeated" and following == 1:
            raise StateError(
                "two consecutive calls have the same timestep: the model is called more than once per step, and the calls would"
                " overwrite one another's cache. Wrap each in `with cached.cache_context(name):`, or set"
                " CacheConfig(calls_per_step=2). If the first call belonged to an interrupted run, call cached.reset()."
            )
        else:
            return "", ""
        return why, f"{why} before step {following}: a new generation began"


def _doubt(verdict: Verdict, clock: Clock) -> str:
    """Return why a call may not be the next step of its generation; empty where there is no doubt."""
    if clock.doubt:
        return "the timestep repeats in half precision, and calls without a context name cannot be told apart"
    if verdict == "unsure" and not clock.moved:
        return "the timestep repeats in half precision, and a new run cannot be told from this one"
    return ""
