"""Which step of which generation a call is, and whether it reuses. Needs no torch.

The cached model, the session of a bundle and the exporter's check are shells over the values in this file, and
`examples/aoti/stepping.hpp` mirrors it and `clock.py` for C++. Everything here is immutable: a call that fails leaves nothing behind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping

from bwcache_compile.clock import Clock, TimeInput, Verdict
from bwcache_compile.errors import StateError

UNNAMED = "default"
"""Context of the calls that are made outside of every `cache_context`."""


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
class RunStep:
    """What a loop that calls the model knows of itself.

    Attributes:
        run: Identifies its run; another object means another run.
        num_steps: Steps of the run.
        counts_steps: Whether it counts its steps, so that calls at one count belong to one step.
        step: Index of the step; None before the first step has ended, and where steps are not counted.
    """

    run: object
    num_steps: int | None
    counts_steps: bool = False
    step: int | None = None


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


def cache_cleared(why: str, step: int) -> str:
    """Say in a report that a step ran on an empty cache, and why."""
    return f"{why} before step {step}: the cache was cleared"


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
            if num_steps is None:
                raise StateError(f"step_index must be at least 0, got {given}.")
            raise StateError(
                f"step_index must be from 0 to {num_steps - 1}, got {given}: this generation has {num_steps} steps. Pass"
                " num_inference_steps to cache_context, or call reset(num_steps=...), if it has more."
            )
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
        event = cache_cleared(cleared, step) if cleared else ""
        return Advance(step, "", cleared, event, dataclasses.replace(following, run=run) if joins else following)

    def is_beside(self, other: Tracker) -> bool:
        """Whether two contexts were last called at the same step of one run, as far as step index or time can tell."""
        if self.clock.signs:
            return self.clock.shows_time_of(other.clock)
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
