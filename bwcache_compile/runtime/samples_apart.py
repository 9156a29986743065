"""Check that a model keeps the samples of a batch apart, once for each program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bwcache_compile.errors import UnsupportedGraphError
from bwcache_compile.ir.compare import TOLERANCES, relative_error
from bwcache_compile.runtime.gate import CaptureGate
from bwcache_compile.runtime.match import ProgramMatch
from bwcache_compile.runtime.runnable import RunnableProgram

_LEAST = 1e-6
"""Values below it are rounding."""


def _first_step(runnable: RunnableProgram, match: ProgramMatch, flat: Sequence[Any]) -> list[Any]:
    """Run the compute graph on an empty state and return the model's outputs and the slots."""
    state, io = runnable.fresh(match.sizes), runnable.io["compute"]
    values = [torch.zeros(()) for _ in io.parameters]
    named = {parameter.name: parameter for parameter in runnable.plan.settings.parameters}
    for i, name in enumerate(io.parameters):
        shape = runnable.plan.settings.shape(named[name])
        # whatever is decided: nothing of it is used
        values[i] = torch.ones(shape, dtype=getattr(torch, named[name].dtype), device=runnable.plan.device)
    operands = runnable.operands([leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in flat], state, tuple(values))
    with torch.no_grad():
        returned = runnable.eager["compute"](*operands)
    named_values = io.unpack(returned)
    return [*(named_values[name] for name in io.results), *runnable.written(named_values)]


def check_apart(match: ProgramMatch, flat: Sequence[Any], batched: frozenset[int], size: int, gate: CaptureGate) -> None:
    """Check that a sample's outputs and its part of the cache depend on its own inputs alone.

    The compute graph runs twice: as called, and with other samples around the last one. Once for each program, and not for a single sample.

    Raises:
        UnsupportedGraphError: They depend on other samples, or do not lie one after the other along dimension 0.
    """
    runnable = match.runnable
    if size == 1 or runnable.samples_apart:
        return
    name = runnable.program.model_name
    read = sorted(i for i in runnable.program.signature.read if isinstance(i, int) and i in batched)
    read += sorted(reading.source for reading in runnable.program.signature.readings if reading.source in batched)
    if read:
        raise UnsupportedGraphError(
            f"{name} reads the values of `{runnable.program.signature.inputs[read[0]]}`, which holds one for each sample, in Python at"
            f" {runnable.program.signature.read_at}: graphs are right for these values alone. Use batch_reduce='max' or 'joint'."
        )

    def among_others(leaf: Tensor) -> Tensor:
        last = leaf[-1:].expand_as(leaf).clone()
        if last.is_floating_point() or last.is_complex():
            last[:-1] *= 0.5
        return last

    others = [among_others(leaf) if at in batched else leaf for at, leaf in enumerate(flat)]
    with gate.running():
        one, two = _first_step(runnable, match, flat), _first_step(runnable, match, others)
    names = [*runnable.io["compute"].results, *(f"the cache's {slot.name}" for slot in runnable.slots)]
    for what, a, b in zip(names, one, two, strict=True):
        if not isinstance(a, Tensor):
            continue
        if a.dim() == 0 or a.shape[0] % size:
            raise UnsupportedGraphError(
                f"{name} returns {what} of shape {list(a.shape)}, which does not hold {size} samples along dimension 0. Use"
                " batch_reduce='max' or 'joint'."
            )
        rows = a.shape[0] // size
        tolerance = TOLERANCES.get(a.dtype, 0.0)
        if relative_error(b[-rows:], a[-rows:], least=_LEAST) > tolerance:
            raise UnsupportedGraphError(
                f"{name} does not keep the samples of a batch apart: {what} of the last of {size} samples changes with the other samples."
                " Either the model mixes them, or an input has as many entries along dimension 0 as the batch has samples, and holds"
                " something else. Use batch_reduce='max' or 'joint'."
            )
    runnable.samples_apart = True
