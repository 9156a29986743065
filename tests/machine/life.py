"""The stateful test's machine: scripts of what clients, their failures and their threads do, run on every subject at once."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from torch import Tensor

import bwcache_compile as bw
from tests.machine.reference import Reference, pattern
from tests.machine.subjects import CONFIG, WHOLE, Fault, ModelSubject, Subject, in_thread, subjects

SIZES = ((2, 6), (2, 10), (3, 6))
CONTEXTS = ("cond", "uncond")
LONGEST = 9
"""Steps of the longest video, which go past `num_steps`."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64)
"""Dtypes of the time."""
MODES = ("named", "indexed", "unnamed", "in turns")


class InjectedError(Exception):
    """Stands for whatever may fail inside a call."""


def _fail() -> None:
    raise InjectedError


@dataclasses.dataclass
class Video:
    """What the client makes: which calls belong together, known to it alone.

    Attributes:
        number: Of all videos of a script.
        sizes: Batch and tokens.
        interval: How far the time moves per step, in parts of 1024: times of small steps repeat in half precision.
        widened: Whether the first step's time is float32, as where a scheduler changes the latents' dtype.
        undisturbed: Whether nothing has happened since a beginning that cannot be missed, so that the steps must follow the policy.
    """

    number: int
    sizes: tuple[int, int]
    interval: int
    widened: bool
    undisturbed: bool
    step: int = 0
    given_up: bool = False


@dataclasses.dataclass
class Tally:
    """What was run."""

    scripts: int = 0
    calls: int = 0
    reused: int = 0
    failures: int = 0
    followed: int = 0


class Life(RuleBasedStateMachine):
    """One script. Subclasses say in which dtype the time comes."""

    dtype: torch.dtype
    tally: Tally

    @initialize(mode=st.sampled_from(MODES), sizes=st.sampled_from(SIZES), interval=st.sampled_from((64, 1)))
    def start(self, mode: str, sizes: tuple[int, int], interval: int) -> None:
        self.mode = mode
        self.subjects = subjects(self.dtype, 2 if mode == "in turns" else 1)
        self.references = {subject.name: Reference(subject) for subject in self.subjects}
        self.contexts = ("default",) if mode == "unnamed" else ("call_0", "call_1") if mode == "in turns" else CONTEXTS
        self.config = CONFIG
        self.video = Video(0, sizes, interval, False, True)
        self.tally.scripts += 1

    # -- what a client does --------------------------------------------------------------------------------------

    @rule(
        sizes=st.sampled_from((SIZES[0], SIZES[0], *SIZES)),
        interval=st.sampled_from((64, 64, 1)),
        widened=st.booleans(),
        reset=st.sampled_from((False, False, True)),
        alone=st.sampled_from((0, 0, 0, 2, 3)),
        count=st.integers(0, LONGEST),
    )
    def begin(self, sizes: tuple[int, int], interval: int, widened: bool, reset: bool, alone: int, count: int) -> None:
        """Begin another video, whatever became of the last one; some steps may be without guidance, with one context alone."""
        before = self.video
        noticed = before.undisturbed and before.step >= 2 and before.interval > 1
        self.video = Video(before.number + 1, sizes, interval, widened, reset or noticed)
        if reset:
            self.forget(lambda subject: subject.called.reset())
        if self.mode in ("named", "indexed"):
            for _ in range(alone):
                self.call_all("first")
        self.steps(count)

    @precondition(lambda self: self.goes_on)
    @rule(count=st.integers(1, LONGEST))
    def more_steps(self, count: int) -> None:
        """Go on with the video."""
        self.steps(count)

    def steps(self, count: int) -> None:
        """Call the model for the next steps."""
        for _ in range(count):
            if self.goes_on:
                self.call_all("both")

    @precondition(lambda self: self.goes_on)
    @rule(order=st.sampled_from(("swapped", "first", "second")))
    def step(self, order: str) -> None:
        """Call the model for each context of a step; or for one, where guidance is on at some steps only."""
        if len(self.contexts) == 1 or self.mode == "in turns":
            order = "both"
        self.call_all(order)

    def call_all(self, order: str) -> None:
        """Call every subject for the contexts of a step."""
        contexts = {"both": self.contexts, "swapped": self.contexts[::-1], "first": self.contexts[:1], "second": self.contexts[1:]}[order]
        self.video.undisturbed &= order == "both"
        for context in contexts:
            for subject in self.subjects:
                self.call(subject, context)
        self.video.step += 1

    @precondition(lambda self: self.goes_on and self.mode in ("named", "indexed"))
    @rule()
    def step_on_two_threads(self) -> None:
        """Call the model for both contexts at once."""
        self.video.undisturbed = False  # either may come first
        for subject in self.subjects:
            waiting = [(context, in_thread(functools.partial(self.outcome, subject, context))) for context in self.contexts]
            for context, result in waiting:
                self.check(subject, context, result())
        self.video.step += 1

    @precondition(lambda self: self.goes_on)
    @rule(at=st.integers(1, 40), after=st.booleans(), second=st.booleans(), again=st.booleans())
    def step_that_fails(self, at: int, after: bool, second: bool, again: bool) -> None:
        """Fail somewhere inside a call. The client calls again, or gives the video up."""
        failing = self.contexts[-1] if second else self.contexts[0]
        again |= self.mode == "in turns"  # such calls are told apart by their order alone
        self.video.undisturbed = False
        for subject in self.subjects:
            for context in self.contexts:
                if context == failing:
                    try:
                        output = self.outcome(subject, context, Fault(at, _fail, after))
                    except (InjectedError, bw.BundleError, bw.StateError):
                        self.tally.failures += 1
                        output = self.outcome(subject, context) if again else None
                    if output is None:
                        break
                    self.check(subject, context, output)
                else:
                    self.call(subject, context)
        self.video.step += 1
        self.video.given_up = not again

    @precondition(lambda self: self.goes_on)
    @rule()
    def wrong_input(self) -> None:
        """Call with one channel less than the model takes."""
        for subject in self.subjects:
            x, t = self.inputs(subject, self.contexts[0])
            with pytest.raises(Exception):  # noqa: B017, PT011 - whatever the model or the bundle raises
                subject.call(x[..., :3], t, *self.naming(self.contexts[0]))
        self.video.undisturbed = False

    @precondition(lambda self: self.goes_on)
    @rule(at=st.integers(1, 8))
    def intrude(self, at: int) -> None:
        """Enter a context on another thread while a call runs in it: it is refused, and the call is not disturbed."""
        for context in self.contexts:
            for subject in self.subjects:
                refused: list[Any] = []

                def enter(subject: Subject = subject, context: str = context, refused: list[Any] = refused) -> None:
                    try:
                        refused.append(in_thread(functools.partial(self.outcome, subject, context))())
                    except bw.StateError as refusal:
                        refused.append(refusal)

                at = at if isinstance(subject, ModelSubject) else 1
                output = self.outcome(subject, context, Fault(at, enter, method="run"))
                assert all("in use by another thread" in str(error) for error in refused), refused
                self.check(subject, context, output)
        self.video.step += 1

    # -- what happens to the model and the settings --------------------------------------------------------------

    @rule()
    def reset(self) -> None:
        """Reset everything in the middle of a video."""
        self.video.undisturbed = False
        self.forget(lambda subject: subject.called.reset())

    @rule(
        changes=st.fixed_dictionaries(
            {},
            optional={"threshold": st.sampled_from((0.0, math.inf)), "reuse_interval": st.integers(1, 3), "num_steps": st.integers(4, 8)},
        )
    )
    def configure(self, changes: dict[str, Any]) -> None:
        """Change settings in the middle of a video."""
        self.video.undisturbed = False
        self.config = dataclasses.replace(self.config, **changes)
        for subject in self.subjects:
            subject.called.configure(**changes)

    @rule(edit=st.sampled_from(("weight", "address", "buffer", "attribute", "state_dict", "invalidate")))
    def edit(self, edit: str) -> None:
        """Change the model's weights, or say that they have changed. A session has its own."""
        self.video.undisturbed = False
        for subject in self.subjects:
            if isinstance(subject, ModelSubject):
                subject.edit(edit)

    # -- calling and checking ------------------------------------------------------------------------------------

    @property
    def goes_on(self) -> bool:
        """Whether the client may call for another step of its video."""
        steps = self.config.num_steps if self.mode == "indexed" else LONGEST
        return not self.video.given_up and self.video.step < steps

    def inputs(self, subject: Subject, context: str) -> tuple[Tensor, Tensor]:
        """Return the inputs of the current step."""
        video = self.video
        generator = torch.Generator().manual_seed(1000 * video.number + 10 * video.step + self.contexts.index(context))
        x = torch.randn(*video.sizes, 4, generator=generator)
        time = torch.full((video.sizes[0],), WHOLE - video.interval * video.step)
        if not self.dtype.is_floating_point:
            return x, time.to(self.dtype)
        widened = video.widened and video.step == 0 and isinstance(subject, ModelSubject)
        return x, (time / WHOLE).to(torch.float32 if widened else self.dtype)

    def naming(self, context: str) -> tuple[str | None, int | None]:
        """Return what the client says of a call."""
        return (context if self.mode in ("named", "indexed") else None), (self.video.step if self.mode == "indexed" else None)

    def outcome(self, subject: Subject, context: str, fault: Fault | None = None) -> Tensor:
        """Call a subject for the current step, with a fault inside the call if one is given."""
        x, t = self.inputs(subject, context)
        try:
            with subject.faulty(fault) if fault else contextlib.nullcontext():
                return subject.call(x, t, *self.naming(context))
        except bw.StateError as error:  # two runs of which the first was broken off after one step look like two calls of a step
            if self.mode != "unnamed" or self.video.step or "have the same timestep" not in str(error):
                raise
            subject.called.reset()
            self.references[subject.name].forget()
            return subject.call(x, t, *self.naming(context))

    def call(self, subject: Subject, context: str) -> None:
        """Call a subject for the current step, and check what comes out."""
        self.check(subject, context, self.outcome(subject, context))

    def check(self, subject: Subject, context: str, output: Tensor) -> None:
        """Fail unless an output is right, and its step follows the policy where nothing disturbed it."""
        video = self.video
        computed = self.references[subject.name].check(output, *self.inputs(subject, context), context, video.number)
        self.tally.calls += 1
        self.tally.reused += not computed
        if video.undisturbed and video.interval > 1:
            steps = self.config.num_steps
            expected = pattern(self.config, steps)[video.step % steps]
            assert computed == expected, f"{subject.name}: step {video.step} was {'computed' if computed else 'reused'}"
            self.tally.followed += 1

    def forget(self, act: Callable[[Subject], None]) -> None:
        for subject in self.subjects:
            act(subject)
            self.references[subject.name].forget()


def run_scripts(dtype: torch.dtype, count: int) -> Tally:
    """Run scripts whose times are of one dtype, the same at every run. One that fails is shrunk and raises."""
    tally = Tally()
    machine: type[Life] = type("Scripts", (Life,), {"dtype": dtype, "tally": tally})
    chosen = settings(
        max_examples=count,
        stateful_step_count=25,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        phases=(Phase.explicit, Phase.generate),  # shrinking takes minutes; ask for it where a script fails
    )
    run_state_machine_as_test(machine, settings=chosen)
    return tally
