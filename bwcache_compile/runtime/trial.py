"""The functions that make a program, the call that needs one, and the run that checks it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import CaptureError, ConfigError, NoBlocksFoundError, UnsupportedGraphError
from bwcache_compile.ir.compare import Reference
from bwcache_compile.ir.graph_text import GraphDiff
from bwcache_compile.ir.program import ModelProgram
from bwcache_compile.ir.ranks import Ranks, named
from bwcache_compile.runtime.runnable import RunnableProgram
from bwcache_compile.runtime.runnable_graphs import Outline
from bwcache_compile.runtime.signature import CallKey


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """The functions that make a program of a model. They are passed in, so that `runtime` does not import the passes.

    Attributes:
        capture: Model, positional and keyword arguments, which sizes stay open, whether values that sizes depend on are built
            in, what the model returns, and how to run what is made of a capture, to a captured program.
        build: A captured program, which it consumes, and settings to a cached one.
        explain: The same to the diff of each pass.
        guard: Where the guard of a program is that `build` makes: "host" or "graph".
        outlined: See `Outline`; None compiles each block for itself.
        ranks: Those that decide together by the programs that `build` makes; None for one process.
    """

    capture: Callable[..., ModelProgram]
    build: Callable[[ModelProgram, CacheConfig], ModelProgram]
    explain: Callable[[ModelProgram, CacheConfig], dict[str, GraphDiff]]
    guard: str = "host"
    outlined: Outline | None = None
    ranks: Ranks | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """A call that needs a program: what it looks like, the model's outputs for it, and the settings in force."""

    key: CallKey
    reference: Reference
    config: CacheConfig
    num_steps: int | None

    def first_step(self, runnable: RunnableProgram) -> list[Any]:
        """Run a program on this call, on a fresh state at step 0, and return all that its graph returns."""
        state = runnable.fresh(runnable.symbols(self.key) or {})
        kind = runnable.kind(state)
        try:
            parameters = runnable.parameters(self.config, self.num_steps, kind)
        except ConfigError:  # the number of steps is not known yet; outputs do not depend on it
            parameters = runnable.parameters(self.config, 2, kind)
        with torch.no_grad():
            return list(runnable.eager[kind](*runnable.operands(self.reference.inputs(), state, parameters)))


class Trial:
    """Makes a program of a capture and runs it, so that the check covers what will run."""

    def __init__(self, make: Callable[[ModelProgram], RunnableProgram], request: Request) -> None:
        self._make, self._request = make, request
        self.runnable: RunnableProgram | None = None
        self.first: list[Any] | None = None
        self.error: CaptureError | NoBlocksFoundError | UnsupportedGraphError | None = None

    def run(self, captured: ModelProgram) -> list[Any]:
        """Return the model's outputs as the finished graph returns them, or the captured one if no program can be made of it."""
        self.runnable = self.first = self.error = None
        try:
            self.runnable = self._make(captured)
        except (NoBlocksFoundError, UnsupportedGraphError) as error:
            self.error = error  # which may be due to a wrong capture
        own = None if self.error is None else named(self.error)
        joint = self._request.reference.agreement.joint(own)
        if joint != own:
            self.error = CaptureError(joint)
        if self.error is not None or self.runnable is None:
            self.runnable = None
            return list(captured.fresh().compute(*self._request.reference.inputs()))
        self.first = self._request.first_step(self.runnable)
        return self.first[: self.runnable.program.signature.out_spec.num_leaves]

    def result(self, captured: ModelProgram) -> tuple[RunnableProgram, list[Any] | None]:
        """Return the program, and what its graph returned if it was checked.

        Raises:
            NoBlocksFoundError, UnsupportedGraphError: No program can be made of the capture.
            CaptureError: None can be made on another rank.
        """
        if self.error is not None:
            raise self.error
        return self.runnable or self._make(captured), self.first
