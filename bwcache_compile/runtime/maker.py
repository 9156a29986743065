"""Capture a model for a call, and make a program of what was captured."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Collection, Hashable
from typing import Any

from torch import nn

from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import CaptureError, ConfigError, NoBlocksFoundError, UnsupportedGraphError, warn
from bwcache_compile.ir.program import ModelProgram
from bwcache_compile.ir.sizes import VaryingSizes
from bwcache_compile.runtime import notes
from bwcache_compile.runtime.compilation import Compilation
from bwcache_compile.runtime.runnable import RunnableProgram, make_room
from bwcache_compile.runtime.signature import CallKey
from bwcache_compile.runtime.trial import Request, Toolchain, Trial
from bwcache_compile.runtime.watch import ModelWatch

MAX_SIBLINGS = 8
"""Programs of one capture that are kept. FX keeps the text of every graph as long as the process lives, so to make them at each switch
would grow without end."""


def differ_in_sizes(one: CallKey, other: CallKey) -> bool:
    """Whether two calls differ in sizes, and look alike otherwise."""
    return one.kind == other.kind and one.sizes != other.sizes


class ProgramMaker:
    """Makes the programs of a model.

    Attributes:
        fixed: Why calls of a kind have fixed sizes, for the kinds of which no program has dynamic ones.
    """

    def __init__(self, model: nn.Module, toolchain: Toolchain, dynamic_shapes: Any, watch: ModelWatch) -> None:
        """Make nothing yet."""
        self._model, self._toolchain, self._shapes, self._watch = model, toolchain, dynamic_shapes, watch
        self._alive: weakref.WeakSet[RunnableProgram] = weakref.WeakSet()
        self._compilation: Compilation | None = None
        self._ran = False
        self.fixed: dict[Hashable, str] = {}

    def addresses(self) -> frozenset[int]:
        """Return the addresses of the tensors that programs hold."""
        return frozenset().union(*(runnable.addresses for runnable in self._alive))

    def compile(self, compilation: Compilation) -> None:
        """Compile every program, those made later too."""
        self._compilation = compilation
        for runnable in self._alive:
            runnable.compile(compilation)

    def make(self, request: Request, kept: Collection[CallKey]) -> tuple[RunnableProgram, list[Any] | None]:
        """Capture the model for a call and make a program; with dynamic sizes where a call of another size was captured before.

        Args:
            request: The call.
            kept: The calls that programs were captured for, as far as these are kept.

        Returns:
            The program, and what its graph returned for this call if it was checked.

        Raises:
            CaptureError, NoBlocksFoundError, UnsupportedGraphError, ConfigError: The model cannot be captured for this call.
        """
        key = request.key
        alike = [other for other in kept if differ_in_sizes(other, key)]
        varying = VaryingSizes(tuple(other.sizes for other in alike)) if alike else None
        asked = self._shapes if self._shapes is not None else varying
        if alike and key.kind in self.fixed:
            asked = None
        try:
            if not self._ran:
                request.reference.outputs()  # exporting a model that never ran can damage it
                self._ran = True
            try:
                runnable, first = self._attempt(request, asked, kept)
            except (CaptureError, NoBlocksFoundError, UnsupportedGraphError, ConfigError) as error:
                if asked is None or not alike:
                    raise
                self.fixed[key.kind] = " ".join(line.strip() for line in str(error).splitlines()[:2])
                runnable, first = self._attempt(request, None, kept)
        except BaseException:
            self._watch.accept_changes(self.addresses())  # the model ran, also where it could not be captured
            raise
        self._alive.add(runnable)
        changed_by_forward = self._watch.accept_changes(self.addresses())
        signs = notes.suspicious(runnable.program, changed_by_forward, getattr(self._model, notes.UNREAD_FIRST, 0))
        for text in (*signs, *notes.amplified_noise(runnable.program, request.config)):
            warn(text)
        return runnable, first

    def _attempt(self, request: Request, shapes: Any, kept: Collection[CallKey]) -> tuple[RunnableProgram, list[Any] | None]:
        reference, trial = request.reference, Trial(lambda captured: self._built(captured, request, kept), request)

        def capture(reading: bool) -> ModelProgram:
            return self._toolchain.capture(
                self._model, reference.args, reference.kwargs, shapes, reading, reference=reference, run=trial.run
            )

        captured = capture(False)
        try:
            return trial.result(captured)
        except (NoBlocksFoundError, UnsupportedGraphError) as error:
            if not captured.has_unsized_values:
                raise
            try:
                captured = capture(True)
            except CaptureError:
                raise error from None
            return trial.result(captured)

    def _built(self, captured: ModelProgram, request: Request, kept: Collection[CallKey]) -> RunnableProgram:
        program = self._toolchain.build(captured, request.config)
        signature, key = program.signature, request.key
        others = [other.sizes for other in kept if other.kind == key.kind]
        noted = [*notes.built_in(signature), *notes.fixed_sizes(signature, key, others, self.fixed.get(key.kind, ""))]
        made = self._runnable(program, key._replace(values=signature.values), tuple(noted))
        made.siblings[request.config.graph_settings] = made
        return made

    def rebuild(self, runnable: RunnableProgram, config: CacheConfig) -> RunnableProgram:
        """Return the program with graphs for other settings that is made from the same capture.

        A new one is not compared with the model yet. The last few are kept: settings that come back make and compile nothing.
        """
        siblings, settings = runnable.siblings, config.graph_settings
        again = siblings.pop(settings, None)
        if again is None:
            again = self._runnable(self._toolchain.build(runnable.program.fresh(), config), runnable.key, runnable.notes)
            again.checked.clear()
            make_room(siblings, MAX_SIBLINGS)
            again.siblings = siblings
        siblings[settings] = again
        self._alive.add(again)
        return again

    def _runnable(self, program: ModelProgram, key: CallKey, noted: tuple[str, ...]) -> RunnableProgram:
        plan = program.planned()
        program = program.replace(plan=dataclasses.replace(plan, notes=(*plan.notes, *noted)))
        runnable = RunnableProgram(program, key, noted, self._toolchain.outlined)
        if self._compilation is not None:
            runnable.compile(self._compilation)
        return runnable
