"""Keep the programs of one model: make one when a call needs it, and drop all of them when the model changes."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from typing import Any

from torch import nn

from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import StateError, warn
from bwcache_compile.ir.compare import Reference, Verify
from bwcache_compile.ir.graph_text import GraphDiff
from bwcache_compile.ir.program import ModelProgram
from bwcache_compile.ir.ranks import Agreement
from bwcache_compile.ir.torch_compat import trace_artifact
from bwcache_compile.runtime.compilation import Compilation
from bwcache_compile.runtime.drop_in import refuse_training
from bwcache_compile.runtime.gate import CaptureGate
from bwcache_compile.runtime.maker import ProgramMaker, differ_in_sizes
from bwcache_compile.runtime.match import ProgramMatch
from bwcache_compile.runtime.notes import amplified_noise
from bwcache_compile.runtime.runnable import RunnableProgram
from bwcache_compile.runtime.signature import CallKey, call_key, leaves_of
from bwcache_compile.runtime.trial import Request, Toolchain
from bwcache_compile.runtime.watch import ModelWatch

LOGGER = logging.getLogger(__name__)

MAX_PROGRAMS = 8
"""Signatures kept at a time; the least recently used goes first."""


class ProgramCache:
    """Chooses the program of a call, capturing the model where there is none. Threads take turns in here.

    The first call of a kind is captured at its sizes, unless `dynamic_shapes` says otherwise. The second, which differs
    from it in sizes alone, is captured with dynamic sizes, and that program takes the place of those that it covers.

    Attributes:
        gate: Keeps runs and captures apart.
        watch: Says whether the model changed.
        captured: How often the model was captured.
        closed: Whether calls are refused.
    """

    def __init__(self, model: nn.Module, toolchain: Toolchain, dynamic_shapes: Any = None, verify: Verify = "bitwise") -> None:
        """Capture nothing yet."""
        self._model, self._toolchain, self._verify = model, toolchain, verify
        self.gate = CaptureGate()
        self._lock = self.gate.lock
        self.watch = ModelWatch(model)
        self._maker = ProgramMaker(model, toolchain, dynamic_shapes, self.watch)
        self._kept: OrderedDict[CallKey, RunnableProgram] = OrderedDict()
        self._last: RunnableProgram | None = None
        self._structure = self.watch.structure
        self.captured = 0
        self.closed = False

    def __len__(self) -> int:
        return len(self._kept)

    def match(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        config: CacheConfig,
        key: CallKey | None = None,
        held: ProgramMatch | None = None,
        num_steps: int | None = None,
        reuses: bool = False,
    ) -> ProgramMatch:
        """Return the program for a call, capturing the model if there is none yet.

        Args:
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.
            config: For building what is captured.
            key: What the call looks like, if the caller knows.
            held: What the same context ran with last: it keeps that program while its calls look alike, so that a
                program captured meanwhile for another context's sizes does not come between its steps.
            num_steps: Steps of a generation, if another number than the settings say.
            reuses: Whether the step reuses what is cached, so that looking the whole model over would cost more than the step.

        Raises:
            CaptureError, NoBlocksFoundError, UnsupportedGraphError: The model is captured for this call, and cannot be.
            ConfigError: The settings or an input do not fit, or the model has offload hooks.
            StateError: The model is closed or in training mode, or an input requires gradients.
        """
        if self.closed:
            raise StateError("this cached model was closed; transform the model again.")
        key = key or call_key(*leaves_of(args, kwargs))
        refuse_training(self._model)
        with self._lock:
            self._poll(glance=reuses)
            first: list[Any] | None = None
            if held is not None and self._serves(held, key, args, kwargs):
                runnable, sizes = held.runnable, held.sizes
            else:
                request = Request(key, Reference(self._model, args, kwargs, self._verify), config, num_steps or config.steps)
                runnable, first = self._find(request) or self._captured(request)
                held, sizes = None, runnable.symbols(key) or {}
            if self._last is not runnable and runnable.key in self._kept:
                self._kept.move_to_end(runnable.key)
            while len(self._kept) > MAX_PROGRAMS:
                self._kept.popitem(last=False)
            self._last = runnable
            version = (self.watch.structure, self.watch.weights)
            if held is not None and held.version == version:
                return held
            return ProgramMatch(runnable, key._replace(values=runnable.key.values), sizes, version, self.watch.changed, first)

    def version(self, glance: bool) -> tuple[tuple[int, int], str]:
        """Return the model's structure and weights as they are counted, and what changed in its structure last.

        Args:
            glance: Whether looking the whole model over would cost more than the step.
        """
        with self._lock:
            self._poll(glance)
            return (self.watch.structure, self.watch.weights), self.watch.changed

    def _serves(self, held: ProgramMatch, key: CallKey, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the program that a context ran last serves its next call."""
        alike = held.version[0] == self._structure and held.key.sizes == key.sizes and held.key.kind == key.kind
        return alike and held.runnable.reads(self._model, args, kwargs)

    def _poll(self, glance: bool = False) -> None:
        """Drop every program if the model is no longer what was captured."""
        self.watch.glance() if glance else self.watch.poll()
        if self._structure != self.watch.structure:
            self._kept.clear()
            self._maker.fixed.clear()
            self._structure = self.watch.structure
            LOGGER.info("%s changed (%s): its programs were dropped", type(self._model).__name__, self.watch.changed)

    def _find(self, request: Request) -> tuple[RunnableProgram, list[Any] | None] | None:
        """Return a kept program that serves a call; one with dynamic sizes is checked once at each size that it serves.

        Returns:
            The program, and what its graph returned if it was checked; None where there is no such program.
        """
        key, reference = request.key, request.reference
        for runnable in [self._kept[key]] if key in self._kept else reversed(self._kept.values()):
            if runnable.symbols(key) is None or not runnable.reads(self._model, reference.args, reference.kwargs):
                continue
            if not reference.verify or key.sizes in runnable.checked:
                return runnable, None
            wrong, first = self._difference(runnable, request)
            if wrong is None:
                runnable.checked.add(key.sizes)
                return runnable, first
            runnable.refused.add(key.sizes)
            self._maker.fixed[key.kind] = f"the graph with dynamic sizes differs from the model at {key.sizes}: {wrong}"
        return None

    def _difference(self, runnable: RunnableProgram, request: Request) -> tuple[str | None, list[Any]]:
        """Say how a program's outputs differ from the model's at a size that it has not served yet, and return them."""
        request.reference.outputs()
        self.watch.accept_changes(self._maker.addresses())  # the model ran
        try:
            first = request.first_step(runnable)
        except RuntimeError as error:
            return f"it fails with {str(error).splitlines()[0]}", []
        return request.reference.difference(first[: runnable.program.signature.out_spec.num_leaves]), first

    def _captured(self, request: Request) -> tuple[RunnableProgram, list[Any] | None]:
        """Capture the model while no program runs, unless another thread did so meanwhile."""
        self.gate.wait_until_idle()
        return self._find(request) or self._capture(request)

    def _capture(self, request: Request) -> tuple[RunnableProgram, list[Any] | None]:
        began, name = time.perf_counter(), type(self._model).__name__
        if not self.captured:  # later ones may come at other calls of other ranks
            request.reference.agreement = Agreement(name, self._toolchain.ranks)
        with request.reference.agreement.to_the_end():
            runnable, first = self._maker.make(request, self._kept)
        LOGGER.info("captured %s in %.1f s: %d blocks are cached", name, time.perf_counter() - began, len(runnable.plan.blocks))
        trace_artifact("bwcache_plan", lambda: str(runnable.plan))
        trace_artifact("bwcache_graph_diff", lambda: str(self._toolchain.explain(runnable.program.fresh(), request.config)["whole"]))
        for other in [other for other in self._kept if differ_in_sizes(other, request.key)]:
            if runnable.symbols(other) is not None and runnable.key.values in ((), other.values):
                del self._kept[other]
        self._kept[runnable.key] = runnable
        self.captured += 1
        small = runnable.program.planned().work.warning(name)
        if small is not None:
            warn(small)
        if self.captured == 3 * MAX_PROGRAMS:
            changed = f" (last: {self.watch.changed})" if self.watch.changed else ""
            warn(
                f"{self.captured} programs of {name} have been captured, and each capture takes seconds. Something"
                f" changes between calls: an input (a Python number that could be a tensor?), or the model's modules{changed}."
            )
        return runnable, first

    @property
    def latest(self) -> RunnableProgram:
        """The program used last.

        Raises:
            StateError: There is none yet.
        """
        if self._last is None:
            raise StateError("nothing is captured yet: call the model once, or pass example_args / example_kwargs to transform.")
        return self._last

    @property
    def all(self) -> tuple[ModelProgram, ...]:
        """Every program that is kept and fits the model as it is."""
        with self._lock:
            self._poll()
        return tuple(runnable.program for runnable in self._kept.values())

    @property
    def only(self) -> RunnableProgram:
        """The one program there is: compiled code cannot choose among several.

        Raises:
            StateError: There is none, or there are several.
        """
        if len(self._kept) != 1:
            raise StateError(
                "cached.functional_step inside torch.compile requires exactly one captured signature, and the model has"
                f" {len(self._kept)}: transform the model with guard='graph' and example_args / example_kwargs, and call it with inputs"
                " of those shapes."
            )
        if next(iter(self._kept.values())).key.values:
            raise StateError(
                "cached.functional_step inside torch.compile cannot tell whether values that the model reads in Python have changed; call"
                " cached.functional_step outside torch.compile, or torch.compile the cached model."
            )
        return next(iter(self._kept.values()))

    def rebuild(self, config: CacheConfig) -> None:
        """Make the graphs of every program anew, for settings that shape them. Nothing is captured again.

        Each is compared with the model once more at its next call.

        Raises:
            ConfigError, UnsupportedGraphError: The settings do not fit the model. Every program is what it was.
        """
        with self._lock:
            self.gate.wait_until_idle()
            made = OrderedDict((key, self._maker.rebuild(runnable, config)) for key, runnable in self._kept.items())
            last = self._last
            self._last = next((made[key] for key, runnable in self._kept.items() if runnable is last), None)
            self._kept = made

    def judge(self, config: CacheConfig) -> None:
        """Warn of settings that do not suit what is captured."""
        for text in amplified_noise(self._last.program, config) if self._last else ():
            warn(text)

    def explain(self, config: CacheConfig) -> dict[str, GraphDiff]:
        """Return what each pass changed in the program used last."""
        return self._toolchain.explain(self.latest.program.fresh(), config)

    def compile(self, compilation: Compilation) -> None:
        """Compile every program, those captured later too."""
        with self._lock:
            self._maker.compile(compilation)

    def touch(self) -> None:
        """Treat the weights as changed: a method was called that may write to them without a version counter showing it."""
        with self._lock:
            self.watch.weights += 1
            self.watch.suspect()

    def suspect(self) -> None:
        """Compare the whole model at the next call: a method was called that may change it."""
        self.watch.suspect()

    def close(self) -> None:
        """Drop every program, and make no more."""
        self.closed = True
        with self._lock:
            self._kept.clear()
            self._last = None
