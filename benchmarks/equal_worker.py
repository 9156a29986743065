"""One contestant of `equal_schedule.py` in a process of its own: what is compiled for one is neither found nor counted by another."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch._dynamo import utils as dynamo
from torch._inductor import config as inductor

from benchmarks.equal_contestants import CONTESTANTS, MASK, PLAIN, SHELL, STEPS, Compilation, Size

CONTEXTS = ("cond", "uncond")
ATTENTIONS = 2
"""Of one block: over the tokens, and over the text."""
_STEP = "equal_schedule_step"
_WARM_UP = 3
_TEXT_TOKENS = 16


def blocks_run(names: Sequence[str]) -> list[float]:
    """Count the blocks that ran in each call of a step, given the names of a profile's events in order.

    A block is counted by its attention kernels: eager and compiled code call the same ones, and the profiler sees each.
    """
    counts: list[int] = []
    for name in names:
        if name == _STEP:
            counts.append(0)
        elif name.startswith("aten::_scaled_dot_product") and counts:
            counts[-1] += 1
    return [count / (ATTENTIONS * len(CONTEXTS)) for count in counts]


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

    def __init__(self, name: str, size: Size, how: Compilation) -> None:
        """Build the model; nothing is compiled yet."""
        generator = torch.Generator().manual_seed(1)
        self.size, self.mask = size, {PLAIN: (0,) * STEPS, SHELL: (1,) * STEPS}.get(name, MASK)
        self.contestant = CONTESTANTS[name](size, how)
        self.latents = torch.randn(size.latents, generator=generator)
        self.texts = {context: torch.randn(1, _TEXT_TOKENS, 64, generator=generator) for context in CONTEXTS}
        self.times = torch.linspace(999, 50, STEPS)
        self.compiled_before_timing = 0
        dynamo.set_compilation_metrics_limit(1 << 20)
        dynamo.counters.clear()

    def run(self, state: list[int] | None = None) -> list[float]:
        """Run one generation and return the seconds of each step, both contexts together.

        Args:
            state: Takes the bytes of the tool's state after each step but the last, at which some are freed.
        """
        contestant, x = self.contestant, self.latents
        seconds = []
        with torch.no_grad():
            contestant.begin()
            for step in range(STEPS):
                contestant.force(step)
                with torch.profiler.record_function(_STEP) if state is not None else torch.no_grad():
                    began = time.perf_counter()
                    outputs = []
                    for context, text in self.texts.items():
                        with contestant.scope(context):
                            outputs.append(contestant.model(x, self.times[step].reshape(1), text, return_dict=False)[0])
                    x = x - 0.02 * (outputs[1] + 5.0 * (outputs[0] - outputs[1]))
                    if step == STEPS - 1:
                        contestant.finish()
                    seconds.append(time.perf_counter() - began)
                if state is not None and step < STEPS - 1:
                    state.append(contestant.state_bytes())
        return seconds

    def warm_up(self) -> dict[str, Any]:
        """Capture and compile, then watch one generation and return what was seen.

        Raises:
            RuntimeError: The steps that were computed are not those of the mask.
        """
        began = time.perf_counter()
        for _ in range(_WARM_UP):
            seconds = self.run()
        first = time.perf_counter() - began - _WARM_UP * sum(seconds)
        state: list[int] = []
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with quiet(), torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
            self.run(state)
        events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        ran = blocks_run([event.name() for event in events])
        if why := refusal(ran, self.size.blocks, self.mask):
            raise RuntimeError(why)
        compilations = dynamo.get_compilation_metrics()
        self.compiled_before_timing = len(compilations)
        return {
            "blocks_run_at_reused_steps": max((count for count, reuses in zip(ran, self.mask, strict=True) if reuses), default=None),
            "state_bytes": max(state),
            "peak_bytes": peak([event.nbytes() for event in events if event.name() == "[memory]"]),
            "graphs": dynamo.counters["stats"]["unique_graphs"],
            "graph_breaks": sum(dynamo.counters["graph_break"].values()),
            "recompiles": sum(not str(compilation.compile_id).endswith("/0") for compilation in compilations),
            "compile_seconds": sum(compilation.entire_frame_compile_time_s or 0.0 for compilation in compilations),
            "first_run_seconds_beyond_later_ones": first,
        }

    def compiled_while_timed(self) -> int:
        """Count what was compiled since the warm-up."""
        return len(dynamo.get_compilation_metrics()) - self.compiled_before_timing


def serve(connection: Connection, name: str, size: Size, how: Compilation) -> None:
    """Run the methods of a `Worker` that the other side names, until it says None."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    inductor.compile_threads = 1
    worker = None
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(TORCHINDUCTOR_CACHE_DIR=folder, CACHE_DIT_LOG_LEVEL="error")
        while (method := connection.recv()) is not None:
            try:
                worker = worker or Worker(name, size, how)
                connection.send((getattr(worker, method)(), ""))
            except Exception as error:  # the other side leaves this contestant out and goes on
                where = traceback.extract_tb(error.__traceback__)[-1]
                text = str(error).strip().partition("\n")[0]
                connection.send((None, f"{type(error).__name__}: {text} ({where.filename.rpartition('/')[2]}:{where.lineno})"))
