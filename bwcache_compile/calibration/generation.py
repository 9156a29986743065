"""One generation with some steps reused: the stand-in that a pipeline calls, and what happens at each call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from bwcache_compile.calibration.cut_model import CutModel
from bwcache_compile.calibration.recording import Recorder
from bwcache_compile.context import Context
from bwcache_compile.context_methods import whole_number
from bwcache_compile.contexts import ContextTable
from bwcache_compile.errors import StateError
from bwcache_compile.runtime.wrapper import ModelWrapper
from bwcache_compile.stepping import StepInfo

Mask = tuple[bool, ...]
"""For each step, whether it is computed."""


class Rule(Protocol):
    """Gives the weights of a reused step."""

    def __call__(self, run: Generation, key: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return float64[anchors], newest anchor first, for the step that `run` is at, asked at its first call."""
        ...


class Generation:
    """One generation: counts its steps, computes or reuses each, and records it.

    Attributes:
        cut: The model.
        mask: Which steps are computed; None computes all.
        rule: Gives the weights of reused steps.
        recorder: The steps so far.
        states: The state of each context.
        anchors: For each context, its last computed steps, newest first.
        computed_calls: Calls of the model so far.
        weights: The weights of each reused step.
    """

    def __init__(
        self,
        cut: CutModel,
        recorder: Recorder,
        mask: Mask | None = None,
        rule: Rule | None = None,
        on_call: Callable[[Recorder], None] = lambda recorder: None,
    ) -> None:
        """Start before the first call; `on_call` is called after each computed one."""
        self.cut, self.mask, self.rule, self.recorder = cut, mask, rule, recorder
        self._on_call = on_call
        self.states: dict[str, Any] = {}
        self.anchors: dict[str, list[int]] = {}
        self.computed_calls = 0
        self.weights: dict[int, Tensor] = {}
        self._decided_by = ""

    def call(self, info: StepInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run or reuse one call of the model.

        Raises:
            StateError: There are more steps than the mask has.
        """
        key = self.recorder.begin(info, args, kwargs)
        step = self.recorder.step
        if self.mask is not None and step >= len(self.mask):
            raise StateError(
                f"this generation has more than the {len(self.mask)} steps of the first one. `generate` must make one generation with"
                " the same number of steps each time it is called."
            )
        if self.mask is None or self.mask[step] or not self._may_reuse(step, key):
            output = self._compute(step, key, args, kwargs)
        else:
            if step not in self.weights:
                assert self.rule is not None, "a mask that reuses needs a rule"
                self.weights[step], self._decided_by = self.rule(self, key, args, kwargs), key
            output = self.cut.reuse(args, kwargs, self.states[key], self.weights[step])
        self.recorder.finish(key, args, kwargs, output)
        if self.anchors.get(key, [-1])[0] == step:
            self._on_call(self.recorder)
        return output

    def _may_reuse(self, step: int, key: str) -> bool:
        """Return whether a context has anchors, and the same as the context that the step's weights were made for."""
        return key in self.states and (step not in self.weights or self.anchors[key] == self.anchors[self._decided_by])

    def _compute(self, step: int, key: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = self.states.get(key)
        if state is None:
            state = self.cut.fresh(args, kwargs)
        output, self.states[key] = self.cut.compute(args, kwargs, state)
        self.computed_calls += 1
        self.anchors[key] = [step, *self.anchors.get(key, [])][: self.cut.anchors]
        return output


class StandIn(ModelWrapper):
    """Looks like the model to a pipeline, and runs one generation."""

    def __init__(self, generation: Generation) -> None:
        """Stand in for the generation's model."""
        super().__init__(generation.cut.module)
        self._generation = generation
        self._contexts = ContextTable(Context)
        self._seal()

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run or reuse one call of the model."""
        return self._generation.call(self._contexts.info(1), args, kwargs)

    def cache_context(
        self, name: str, *, step_index: int | None = None, num_inference_steps: int | None = None, group: str = "", **details: Any
    ) -> contextlib.AbstractContextManager[None]:
        """Name the calls in a block, as pipelines of diffusers do."""
        step, count = whole_number("step_index", step_index), whole_number("num_inference_steps", num_inference_steps)
        return self._contexts.scope(StepInfo(name, step, count, group=group))


def table_rule(table: Sequence[Sequence[float]]) -> Rule:
    """Return the rule that reads the weights of each step from a table."""

    def weights(run: Generation, key: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return torch.tensor(table[run.recorder.step], dtype=torch.float64)

    return weights
