"""What may come out of a call, by the documented rules alone: a dictionary of what each context's blocks last returned."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tests.machine.subjects import Subject
from tests.reference import decide


@dataclasses.dataclass(frozen=True)
class Kept:
    """What the blocks of a context last returned, for which video and with which weights."""

    video: int
    version: int
    hidden: Tensor


class Reference:
    """Knows which video each call belongs to, which no subject is told."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.kept: dict[str, Kept] = {}

    def forget(self) -> None:
        """Take everything for reset."""
        self.kept = {}

    def check(self, output: Tensor, x: Tensor, t: Tensor, context: str, video: int) -> bool:
        """Fail unless an output is the model's, or one from this video's own cache; return whether it was computed."""
        subject, kept = self.subject, self.kept.get(context)
        with torch.no_grad():
            hidden = subject.model.hidden(x, t)
            computed = self._is(output, subject.model.finish(hidden, t))
            reused = False
            if kept is not None and kept.video == video and kept.version == subject.version and kept.hidden.shape == hidden.shape:
                reused = self._is(output, subject.model.finish(kept.hidden, t))
        assert computed or reused, f"{subject.name}: a wrong output in context {context!r} of video {video}"
        said = subject.called.report().contexts[context].steps[-1].computed
        assert said == computed, f"{subject.name}: the report says that the step was {'computed' if said else 'reused'}, and it was not"
        if computed:
            self.kept[context] = Kept(video, subject.version, hidden)
        return computed

    def _is(self, output: Tensor, expected: Tensor) -> bool:
        if self.subject.tolerance == 0:
            return torch.equal(output, expected)
        return torch.allclose(output, expected, rtol=self.subject.tolerance, atol=self.subject.tolerance)


def pattern(config: object, num_steps: int) -> list[bool]:
    """Return which steps of an undisturbed generation are computed where the threshold is 0 or infinite."""
    measured: dict[int, float] = {}
    trigger, computed = None, []
    for step in range(num_steps):
        reuse, trigger = decide(measured, step, trigger, config)
        computed.append(not reuse)
        if not reuse:
            measured[step] = 1.0 if step else float("inf")
    return computed
