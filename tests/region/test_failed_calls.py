"""A call of a model with several stacks that fails, wherever it does, leaves every stack at the step at which it was."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import bwcache_compile as bw
from tests.region.test_joint_stacks import TwoStacks
from tests.uncaptured import STATIC, STEPS, inputs

PLACES = ("before", "between", "after")
SETTINGS = {
    "masked": STATIC,
    "measured": bw.CacheConfig(num_steps=STEPS, threshold=0.5, reuse_interval=1, indicator_tokens="all"),
    "joint": bw.CacheConfig(num_steps=STEPS, threshold=0.5, reuse_interval=1, indicator_tokens="all", decide="joint"),
    "two calls": bw.CacheConfig(policy="static", steps_mask=STATIC.steps_mask, calls_per_step=2),
}


class Failure(BaseException):
    """Such as a KeyboardInterrupt."""


class Failing(TwoStacks):
    """Fails before, between or after its stacks when it is told to."""

    failing = ""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, temb = self.patch(x), self.embed(t)
        if float(t.mean()) > 2:  # so that it cannot be captured whole
            x = x + 1
        self._reach("before")
        for block in self.blocks:
            x = block(x, temb)
        self._reach("between")
        x = torch.tanh(x)
        for block in self.more:
            x = block(x, temb)
        self._reach("after")
        return self.head(x)

    def _reach(self, place: str) -> None:
        if self.failing == place:
            raise Failure(place)


def scope(cached: Any, said: str, name: str, step: int) -> contextlib.AbstractContextManager[None]:
    """Say the context, the context and the step, or nothing."""
    if said == "nothing":
        return contextlib.nullcontext()
    return cached.cache_context(name, **({"step_index": step} if said == "step" else {}))  # type: ignore[no-any-return]


def run(cached: Any, said: str, failures: dict[tuple[int, str], str]) -> list[Tensor]:
    """Run a generation with two calls a step, or one where nothing is said of them; calls in `failures` fail once."""
    made = []
    names = ("cond",) if said == "nothing" and cached.cache_config.calls_per_step == 1 else ("cond", "uncond")
    for step in range(STEPS):
        for name in names:
            x, t = inputs(step)
            x = x * (1 if name == "cond" else -0.5)
            with torch.no_grad(), scope(cached, said, name, step):
                if (step, name) in failures:
                    cached.failing = failures[step, name]
                    with pytest.raises(Failure):
                        cached(x, t)
                    cached.failing = ""
                made.append(cached(x, t))
    return made


def did(cached: Any) -> dict[str, Any]:
    """Return what a report says, but for the values that were measured."""
    contexts = cached.report().contexts.items()
    return {
        name: ([(s.step, s.computed, s.gap) for s in context.steps], context.events, context.began, context.state_bytes)
        for name, context in contexts
    }


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("masked", "nothing"),
        ("masked", "step"),
        ("joint", "context"),
        ("two calls", "nothing"),
        *(pytest.param("measured", said, marks=pytest.mark.slow) for said in ("nothing", "context", "step")),
        *(pytest.param("joint", said, marks=pytest.mark.slow) for said in ("nothing", "step")),
    ],
)
@pytest.mark.filterwarnings("ignore:no step of context")
def test_a_failed_call_leaves_every_stack_as_it_was(settings: str, said: str) -> None:
    model = Failing().eval()
    cached = bw.transform(model, SETTINGS[settings], capture="region")
    want = run(cached, said, {})
    expected = did(cached)
    events: list[Any] = []
    cached.on_step(events.append)
    for place in PLACES:
        for failures in ({(step, "cond"): place for step in range(STEPS)}, {(2, "uncond"): place, (3, "cond"): place}):
            cached.reset()
            events.clear()
            made = run(cached, said, failures)
            assert all(torch.equal(a, b) for a, b in zip(made, want, strict=True)), (place, failures)
            assert did(cached) == expected, (place, failures)
            assert len(events) == 2 * len(want), "callbacks are told of calls that succeeded, by each stack"
            assert run(cached, said, {(0, "cond"): place})[-1].equal(want[-1]), "the first call of the next run fails"
            assert [done[0] for done in did(cached).values()] == [done[0] for done in expected.values()]


def test_a_failed_call_drops_the_contexts_that_it_made() -> None:
    cached: Any = bw.transform(Failing().eval(), STATIC, capture="region", example_args=inputs(0))
    cached.failing = "between"
    with pytest.raises(Failure), cached.cache_context("cond"):
        cached(*inputs(0))
    assert cached.report().contexts == {}
    for stack in cached.stacks.values():
        with pytest.raises(bw.StateError, match="there is no context 'cond'"):
            stack.drop_context("cond")


def test_what_another_thread_did_meanwhile_stays() -> None:
    model = Failing().eval()
    cached: Any = bw.transform(model, STATIC, capture="region")
    want = run(cached, "context", {})
    expected = did(cached)
    cached.reset()

    def other(step: int, made: list[Tensor]) -> None:
        x, t = inputs(step)
        with torch.no_grad(), cached.cache_context("uncond"):
            made.append(cached(x * -0.5, t))

    class Meanwhile(Failing):
        """Runs the other context in a thread between the stacks, and fails."""

        def _reach(self, place: str) -> None:
            if place == "between" and threading.current_thread() is threading.main_thread() and self.failing == "threads":
                thread = threading.Thread(target=other, args=(step, made))
                thread.start()
                thread.join()
                raise Failure(place)

    model.__class__ = Meanwhile
    made: list[Tensor] = []
    for step in range(STEPS):
        cached.failing = "threads"
        with torch.no_grad(), cached.cache_context("cond"):
            with pytest.raises(Failure):
                cached(*inputs(step))
            cached.failing = ""
            made.append(cached(*inputs(step)))
    assert all(
        torch.equal(a, b) for a, b in zip(made, [out for pair in zip(want[1::2], want[::2], strict=True) for out in pair], strict=True)
    )
    assert {name: done[0] for name, done in did(cached).items()} == {name: done[0] for name, done in expected.items()}
