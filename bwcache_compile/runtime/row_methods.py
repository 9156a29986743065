"""What users call about the samples of a batch that decide by themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bwcache_compile.config import CacheConfig
from bwcache_compile.context_scope import row_group
from bwcache_compile.contexts import ContextTable
from bwcache_compile.errors import ConfigError
from bwcache_compile.runtime.compilation import owned
from bwcache_compile.runtime.context import ModelContext
from bwcache_compile.runtime.fingerprint import model_identity
from bwcache_compile.runtime.frames import call_directly, left_out
from bwcache_compile.runtime.programs import ProgramCache
from bwcache_compile.runtime.row_state import RowState, read_row, write_row
from bwcache_compile.runtime.sample_step import SampleStepper
from bwcache_compile.runtime.warm_up import run_all
from bwcache_compile.stepping import UNNAMED, StepInfo


class RowMethods:
    """The methods of a cached model about rows: the samples of a batch, with `CacheConfig(batch_reduce="per_sample")`."""

    cache_config: CacheConfig
    _contexts: ContextTable[ModelContext]
    _programs: ProgramCache
    _samples: SampleStepper
    _original: nn.Module
    _identity: tuple[tuple[int, int], str] | None = None

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Batch sizes at which graphs have run: powers of two, and the first whole batch."""
        return tuple(sorted(self._samples.sizes.used))

    def row_state(self, row: str, context: str = UNNAMED, *, group: str = "") -> RowState:
        """Return the state of a row in a context; the row goes on as if nothing had been asked.

        `row_state(row).cpu()` saves it to host memory, and `put_row_state` lets a row go on from it, here or in another cached model of
        the same model. The first call reads a sample of each weight, to name the model.

        Raises:
            ConfigError: Samples do not decide by themselves.
            StateError: There is no such row, or another thread is in it.
        """
        self._check_rows()
        return read_row(self._contexts, StepInfo(context, group=row_group(row, group)), self._model_name()[1])

    def put_row_state(self, row: str, state: RowState, context: str = UNNAMED, *, group: str = "") -> None:
        """Let a row go on from a state: its next call is the step after the last one of the state.

        Tensors are moved to the device of the weights. If the graphs keep something else than the state holds (other settings), the next
        call drops the cache and says so.

        Raises:
            ConfigError: Samples do not decide by themselves.
            StateError: There is such a row already, or another model made the state.
        """
        self._check_rows()
        version, name = self._model_name()
        first = next((tensor for tensor in (*self._original.parameters(), *self._original.buffers())), None)
        device = torch.device("cpu") if first is None else first.device
        write_row(self._contexts, StepInfo(context, group=row_group(row, group)), state, name, version, device)

    def drop_row(self, row: str, *, group: str = "") -> None:
        """Free the cache of a row in every context: its request has ended or was broken off.

        Raises:
            ConfigError: Samples do not decide by themselves.
            StateError: There is no such row, or another thread is in it.
        """
        self._check_rows()
        self._contexts.drop_group(row_group(row, group))

    def _check_rows(self) -> None:
        if self.cache_config.batch_reduce != "per_sample":
            raise ConfigError(f"rows require batch_reduce='per_sample', got {self.cache_config.batch_reduce!r}.")

    def _model_name(self) -> tuple[tuple[int, int], str]:
        """Return the version of the model, and its name with a fingerprint of its weights, which is made once for each version."""
        version, _ = self._programs.version(glance=False)
        if self._identity is None or self._identity[0] != version:
            self._identity = version, model_identity(self._original)
        return self._identity

    def _warm_up_batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run every graph once at each batch size that a batch like this one may need."""
        call, config = self._samples.batch_call(args, kwargs), self.cache_config
        steps = config.steps or 2
        for size in self._samples.sizes.up_to(call.count):
            part = self._samples.part_of(call, config, "compute", [0], size, steps)
            runnable = part.match.runnable
            flat = call.gathered([0] * size)
            with self._programs.gate.running():
                run_all(runnable, flat, runnable.fresh(part.match.sizes), runnable.parameters(config, steps))

    @left_out
    def _batch_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a step of a batch whose samples decide by themselves."""
        stepper = self._samples
        step = stepper.begin(args, kwargs, self.cache_config)
        try:
            returned = []
            with torch.no_grad():
                for part in step.parts:
                    runnable = part.match.runnable
                    values = part.first if part.first is not None else call_directly(runnable.graph(part.kind), part.operands)
                    returned.append(owned(values, ()) if runnable.replays() else values)
            outputs = stepper.finish(step, returned)
        finally:
            stepper.end(step)
        for event in step.told:
            stepper.tell(event)
        return outputs

    def _check_functional(self) -> None:
        if self.cache_config.batch_reduce == "per_sample":
            raise ConfigError(
                "the functional form has one state and one decision for a batch, got batch_reduce='per_sample'. Call the cached model, or"
                " set batch_reduce='max' or 'joint'."
            )
