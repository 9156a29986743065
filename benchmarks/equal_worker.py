"""One contestant of `equal_schedule.py` in a process of its own: what is compiled for one is neither found nor counted by another."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import utils as dynamo
from torch._inductor import config as inductor
from torch.autograd import DeviceType

from benchmarks.equal_contestants import CONTESTANTS, MASK, PLAIN, SHELL, STEPS, Compilation, Contestant, Shape

ATTENTIONS = 2
"""Of one block: over the tokens, and over the text."""
STEP = "equal_schedule_step"
"""Name of the profile's event that a step begins with."""


def blocks_run(names: Sequence[str], contexts: int) -> list[float]:
    """Count the blocks that ran in each call of a step, given the names of a profile's events in order, and the calls of a step.

    A block is counted by its attention kernels: eager and compiled code call the same ones, and the profiler sees each.
    """
    counts: list[int] = []
    for name in names:
        if name == STEP:
            counts.append(0)
        elif name.startswith("aten::_scaled_dot_product") and counts:
            counts[-1] += 1
    return [count / (ATTENTIONS * contexts) for count in counts]


def refusal(ran: Sequence[float], blocks: int, mask: Sequence[int] = MASK) -> str:
    """Say why what ran is not the schedule, or nothing if it is.

    A computed step runs every block. A reused step runs one at most, the first, so none in the middle.
    """
    if len(ran) != len(mask):
        return f"{len(ran)} steps were seen, the mask has {len(mask)}"
    for step, (count, reuses) in enumerate(zip(ran, mask, strict=True)):
        if count > 1 if reuses else count != blocks:
            kind = "reuse" if reuses else "compute"
            return f"step {step} ran {count:g} of {blocks} blocks, but the mask says {kind}"
    return ""


def peak(changes: Sequence[int]) -> int:
    """Return the highest sum of the first changes in allocated bytes."""
    highest = total = 0
    for change in changes:
        total += change
        highest = max(highest, total)
    return highest


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what native code prints to standard error, as the profiler does, off the terminal."""
    kept, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)


class Worker:
    """One contestant at one size compiled in one way."""

    def __init__(
        self,
        name: str,
        size: Shape,
        how: Compilation,
        makers: Mapping[str, Callable[[Shape, Compilation], Contestant]] = CONTESTANTS,
    ) -> None:
        """Build the model; nothing is compiled yet."""
        generator = torch.Generator().manual_seed(1)
        placed: Any = {"device": size.device, "dtype": size.dtype}
        self.size, self.how, self.mask = size, how, {PLAIN: (0,) * STEPS, SHELL: (1,) * STEPS}.get(name, MASK)
        self.contestant = makers[name](size, how)
        self.latents = torch.randn(size.latents, generator=generator).to(**placed)
        self.texts = {context: torch.randn(1, *size.text, generator=generator).to(**placed) for context in size.contexts}
        self.times = torch.linspace(999, 50, STEPS).to(size.device)
        self.last = self.latents
        self.compiled_before_timing = 0
        dynamo.set_compilation_metrics_limit(1 << 20)
        dynamo.counters.clear()
        dynamo.clear_compilation_metrics()

    def wait(self) -> None:
        """Wait for the device."""
        if self.times.is_cuda:
            torch.cuda.synchronize()

    def run(self, state: list[int] | None = None) -> list[float]:
        """Run one generation and return the seconds of each step, all contexts together.

        Args:
            state: Takes the bytes of the tool's state after each step but the last, at which some are freed.
        """
        contestant, x = self.contestant, self.latents
        seconds = []
        with torch.no_grad():
            contestant.begin()
            self.wait()
            for step in range(len(self.mask)):
                contestant.force(step)
                with torch.profiler.record_function(STEP) if state is not None else torch.no_grad():
                    began = time.perf_counter()
                    x = self.step(x, step)
                    if step == len(self.mask) - 1:
                        contestant.finish()
                    self.wait()
                    seconds.append(time.perf_counter() - began)
                if state is not None and step < len(self.mask) - 1:
                    state.append(contestant.state_bytes())
        self.last = x
        return seconds

    def step(self, x: Tensor, step: int) -> Tensor:
        """Run a step in each context, and return the latents after it."""
        outputs = []
        for context, text in self.texts.items():
            with self.contestant.scope(context):
                outputs.append(self.contestant.model(x, self.times[step].reshape(1), text, return_dict=False)[0])
        return x - 0.02 * (outputs[-1] + 5.0 * (outputs[0] - outputs[-1]))

    def profiled(self) -> tuple[list[Any], int]:
        """Run one generation under the profiler; return its events in order, and the bytes of the tool's state.

        Raises:
            RuntimeError: The steps that were computed are not those of the mask.
        """
        state: list[int] = []
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.times.is_cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with quiet(), torch.profiler.profile(activities=activities, profile_memory=not self.times.is_cuda) as profile:
            self.run(state)
        events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        return [event for event in events if event.name() != STEP or event.device_type() == DeviceType.CPU], max(state)

    def blocks_run(self, events: Sequence[Any]) -> list[float] | None:
        """Count the blocks that ran in each call of a step; None where the profiler does not see them.

        Raises:
            RuntimeError: They are not those of the mask.
        """
        if not self.contestant.runs_aten or (self.how.cuda_graphs and self.times.is_cuda):
            return None
        ran = blocks_run([event.name() for event in events], len(self.texts))
        if why := refusal(ran, self.size.blocks, self.mask):
            raise RuntimeError(why)
        return ran

    def warm_up(self) -> dict[str, Any]:
        """Capture and compile, then watch one generation and return what was seen.

        Raises:
            RuntimeError: The steps that were computed are not those of the mask.
        """
        began = time.perf_counter()
        for _ in range(self.size.warm_up):
            seconds = self.run()
        first = time.perf_counter() - began - self.size.warm_up * sum(seconds)
        events, state_bytes = self.profiled()
        ran = self.blocks_run(events) or []
        return {
            "blocks_run_at_reused_steps": max((count for count, reuses in zip(ran, self.mask, strict=False) if reuses), default=None),
            "state_bytes": state_bytes,
            "peak_bytes": peak([event.nbytes() for event in events if event.name() == "[memory]"]),
            **self.compilations(),
            "first_run_seconds_beyond_later_ones": first,
        }

    def compilations(self) -> dict[str, Any]:
        """Return what was compiled so far; what is compiled from here on counts as compiled while timed."""
        compilations = dynamo.get_compilation_metrics()
        self.compiled_before_timing = len(compilations)
        return {
            "graphs": dynamo.counters["stats"]["unique_graphs"],
            "graph_breaks": sum(dynamo.counters["graph_break"].values()),
            "recompiles": sum(not str(compilation.compile_id).endswith("/0") for compilation in compilations),
            "compile_seconds": sum(compilation.entire_frame_compile_time_s or 0.0 for compilation in compilations),
        }

    def compiled_while_timed(self) -> int:
        """Count what was compiled since the warm-up."""
        return len(dynamo.get_compilation_metrics()) - self.compiled_before_timing


def serve(connection: Connection, make: Callable[[], Any], threads: int | None, cache: str | None) -> None:
    """Run the methods that the other side names of what `make` returns, a `Worker`, until it says None.

    Args:
        connection: To the other side.
        make: Called at the first method.
        threads: Of torch and of the compiler; None leaves them as they are.
        cache: Folder of compiled code; None is an empty one, which is deleted afterwards.
    """
    warnings.filterwarnings("ignore")
    if threads is not None:
        torch.set_num_threads(threads)
        inductor.compile_threads = threads
    worker = None
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(TORCHINDUCTOR_CACHE_DIR=cache or folder, CACHE_DIT_LOG_LEVEL="error")
        while (method := connection.recv()) is not None:
            try:
                worker = worker or make()
                connection.send((getattr(worker, method)(), ""))
            except Exception as error:  # the other side leaves this contestant out and goes on
                where = traceback.extract_tb(error.__traceback__)[-1]
                text = str(error).strip().partition("\n")[0]
                connection.send((None, f"{type(error).__name__}: {text} ({where.filename.rpartition('/')[2]}:{where.lineno})"))
