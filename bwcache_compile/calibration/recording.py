"""Record a generation: at each step, the latents that go into the model and what each context's call returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bwcache_compile.calibration.moving_input import MovingInput, candidates, first_output, float_leaves, time_of
from bwcache_compile.contexts import UNNAMED_PREFIX
from bwcache_compile.errors import StateError
from bwcache_compile.ir.torch_compat import pytree
from bwcache_compile.ir.tree_paths import Path
from bwcache_compile.stepping import UNNAMED, StepInfo

Call = tuple[tuple[Any, ...], dict[str, Any]]
Schedule = Sequence[tuple[int, str]]
"""Step and context of each call of a generation."""


@dataclasses.dataclass
class RecordedStep:
    """One denoising step of a generation.

    Attributes:
        times: Inputs of the first call that may be the time, by path.
        moving: Recorded elements of the latents; None where they were not found.
        outputs: Recorded elements of each piece of each context's output, in the order of the calls.
        calls: Arguments of each context's call, kept for cuts whose reused steps read them.
        index: Its index among the steps of all models of the generation, where the caller's context says so.
    """

    times: dict[Path, tuple[float, ...]]
    moving: Tensor | None = None
    outputs: dict[str, tuple[Tensor, ...]] = dataclasses.field(default_factory=dict)
    calls: dict[str, Call] = dataclasses.field(default_factory=dict)
    index: int | None = None

    @property
    def bytes(self) -> int:
        """Bytes held by the recorded tensors."""
        tensors = [t for pieces in self.outputs.values() for t in pieces]
        return sum(t.numel() * t.element_size() for t in [*tensors, *([] if self.moving is None else [self.moving])])


@dataclasses.dataclass
class _FirstStep:
    """The calls of the first step, kept until the second shows which input moves.

    Attributes:
        inputs: Copies of the inputs that may be the latents, of the first call.
        outputs: Copies of each context's first output tensor.
    """

    inputs: dict[Path, Tensor] = dataclasses.field(default_factory=dict)
    outputs: dict[str, Tensor] = dataclasses.field(default_factory=dict)


class Recorder:
    """Tells the steps of one generation apart, and records them.

    A call belongs to the step before it if it has the same latents, or if it has the same time and opens a context that
    this step has not seen. Where no latents are found, the time and the contexts' names alone decide.

    Attributes:
        moving_input: Where the latents are in a call; None until they are found.
        steps: The steps so far.
        schedule: Step and context of each call so far.
        output_bytes: Bytes of the outputs of the first step's calls.
        num_steps: Steps of the generation, where the caller's context says so.
    """

    def __init__(self, moving_input: MovingInput | None = None, schedule: Schedule | None = None, keeps_calls: bool = False) -> None:
        """Start before the first call.

        Args:
            moving_input: The latents, where an earlier generation found them.
            schedule: Step and context of each call of an earlier generation, which this one must repeat.
            keeps_calls: Whether to keep the arguments of each call.
        """
        self.moving_input = moving_input
        self.steps: list[RecordedStep] = []
        self.output_bytes = 0
        self.num_steps: int | None = None
        self.schedule: list[tuple[int, str]] = []
        self._given = schedule
        self._first = _FirstStep() if moving_input is None and schedule is None else None
        self._current: Tensor | None = None
        self._keeps_calls = keeps_calls

    @property
    def step(self) -> int:
        """Index of the step of the last call."""
        return len(self.steps) - 1

    def begin(self, info: StepInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Find out which step a call belongs to, and return the name of its context in that step.

        Raises:
            StateError: The call is not the one that the schedule has here, or lacks the latents that the calls before it had.
        """
        self.num_steps = info.num_steps or self.num_steps
        times = time_of(args, kwargs)
        name = info.key if info.named else ""
        given = self._scheduled(name) if self._given is not None else None
        if given[0] > self.step if given else not self.steps or self._is_new_step(name, times, args, kwargs):
            self._settle(args, kwargs)
            self._advance(times, args, kwargs)
            self.steps[-1].index = info.step_index
        seen = sum(key.partition("#")[0] == name or (not name and key.startswith(UNNAMED_PREFIX)) for key in self._keys())
        key = given[1] if given else (f"{name}#{seen}" if seen else name) if name else f"{UNNAMED_PREFIX}{seen}"
        self.schedule.append((self.step, key))
        return key

    def _scheduled(self, name: str) -> tuple[int, str]:
        """Return step and context of this call by the schedule."""
        assert self._given is not None, "asked with a schedule only"
        at = len(self.schedule)
        if at >= len(self._given) or name not in ("", self._given[at][1].partition("#")[0]):
            expected = f"a call in context {self._given[at][1]!r}" if at < len(self._given) else "no more calls"
            raise StateError(
                f"call {at} of this generation is in context {name or 'default'!r}, but the first generation had {expected}."
                " `generate` must make one generation with the same calls each time."
            )
        return self._given[at]

    def _advance(self, times: dict[Path, tuple[float, ...]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.steps.append(RecordedStep(times))
        if self.moving_input is None:
            return
        moving = self.moving_input.tensor(args, kwargs)
        if moving is None:
            raise StateError(f"step {self.step} was called without {_words(self.moving_input.path)}, which held the latents before.")
        self.steps[-1].moving = self._current = self.moving_input.read_input(moving)

    def _keys(self) -> Sequence[str]:
        return list(self.steps[-1].outputs if self._first is None else self._first.outputs)

    def _is_new_step(self, name: str, times: dict[Path, tuple[float, ...]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        same_time = times == self.steps[-1].times
        unseen = bool(name) and name not in self._keys()
        if self._first is not None and self._first.inputs:
            leaves = float_leaves(args, kwargs)
            path, before = next(iter(self._first.inputs.items()))
            same = path in leaves and leaves[path].shape == before.shape and torch.equal(leaves[path], before)
            return not (same_time and (same or unseen))
        if self.moving_input is None:
            return not (unseen or (not name and same_time))
        tensor = self.moving_input.tensor(args, kwargs)
        if tensor is None or self._current is None:
            return True
        now = self.moving_input.read_input(tensor)
        return not (now.shape == self._current.shape and torch.equal(now, self._current)) and not (unseen and same_time)

    def _settle(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """At the first call of the second step: find the latents among the inputs, and record the first step."""
        if self._first is None or not self.steps:
            return
        first, leaves = self._first, float_leaves(args, kwargs)
        self._first = None
        output = next(iter(first.outputs.values()))
        for path, before in first.inputs.items():
            now = leaves.get(path)
            if now is not None and now.shape == before.shape and not torch.equal(now, before):
                self.moving_input = MovingInput.of(path, before, now, output)
                self.steps[0].moving = self.moving_input.read_input(before)
                read, left_out = self.moving_input.read_output, self.moving_input.left_out
                self.steps[0].calls = {key: left_out(*call) for key, call in self.steps[0].calls.items()}
                self.steps[0].outputs = {key: read(tensor) for key, tensor in first.outputs.items()}
                return
        self.steps[0].outputs = {key: () for key in first.outputs}

    def finish(self, key: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Record a call that succeeded."""
        if self._keeps_calls:
            self.steps[-1].calls[key] = (args, kwargs) if self.moving_input is None else self.moving_input.left_out(args, kwargs)
        if self.step == 0:
            self.output_bytes += sum(t.numel() * t.element_size() for t in pytree.tree_leaves(output) if isinstance(t, Tensor))
        if self._first is not None:
            tensor = first_output(output)
            if not self._first.outputs:
                self._first.inputs = {path: leaf.clone() for path, leaf in candidates(args, kwargs, tensor).items()}
            self._first.outputs[key] = tensor.clone()
        else:
            self.steps[-1].outputs[key] = () if self.moving_input is None else self.moving_input.read_output(output)

    def close(self) -> None:
        """End the generation; one of a single step has no latents that move."""
        if self._first is not None and self.steps:
            self.steps[0].outputs = {key: () for key in self._first.outputs}
            self._first = None


def context_names(steps: Sequence[RecordedStep]) -> tuple[str, ...]:
    """Return the contexts of a generation in the order of their first calls; a single unnamed one is "default"."""
    names = list(dict.fromkeys(key for step in steps for key in step.outputs))
    return tuple(UNNAMED if names == [f"{UNNAMED_PREFIX}0"] else name for name in names)


def _words(path: Path) -> str:
    """Name an input by its path in `(args, kwargs)`."""
    return ("argument " if path[0] == 0 else "") + ".".join(map(str, path[1:]))
