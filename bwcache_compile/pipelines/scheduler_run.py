"""What a pipeline's scheduler tells of the run that it is in. Nothing is read from the device."""

from __future__ import annotations

import weakref
from typing import Any

from bwcache_compile.stepping import RunStep


class SchedulerRun:
    """The run of a pipeline, as its scheduler counts it.

    Each run of a pipeline calls `scheduler.set_timesteps`, which makes a new tensor of timesteps: another tensor is another run. Its
    length is the number of calls that the solver makes per context, 2N - 1 for one of Heun's kind. Most schedulers count their steps
    in `step_index`, from `begin_index` on, where an image is given to start from.
    """

    def __init__(self, pipe: Any) -> None:
        """Follow a pipeline, whose scheduler may be replaced between two runs. It is not kept alive."""
        self._pipe = weakref.ref(pipe)

    def __call__(self) -> RunStep | None:
        """Return the run and the step of the next call; None where the pipeline has no scheduler with timesteps, or no run."""
        pipe = self._pipe()
        scheduler: Any = getattr(pipe, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None:
            return None
        if not hasattr(scheduler, "step_index"):  # of the DDIM family
            return RunStep(timesteps, min(len(timesteps), getattr(pipe, "num_timesteps", None) or len(timesteps)))
        begin, index = getattr(scheduler, "begin_index", None) or 0, scheduler.step_index
        num_steps, step = len(timesteps) - begin, None if index is None else index - begin
        if step is not None and step >= num_steps:  # its run has ended: another loop calls
            return None
        return RunStep(timesteps, num_steps, True, step)
