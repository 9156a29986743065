"""How a call of the graph corresponds to a call of the model, and which of its values are constants of the graph."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from bwcache_compile.ir.examples import Example
from bwcache_compile.ir.sizes import DynamicSizes
from bwcache_compile.ir.torch_compat import TreeSpec, pytree

OPERAND = object()
"""Stands for the operand in the steps of a `Reading`."""


def _operand(tensor: Tensor, leaf: Any) -> Any:
    return tensor if leaf is OPERAND else leaf


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """A value that a model read in Python and computed from a large input by a few functions, such as `torch.all(x == 0)`.

    Attributes:
        source: The input's position among the leaves of the call.
        steps: Functions with their arguments, where `OPERAND` stands for the result of the previous step.
        value: What the last one returned when the model was captured.
    """

    source: int
    steps: tuple[tuple[Callable[..., Any], Any, Any], ...]
    value: Tensor | None = None

    def apply(self, tensor: Tensor) -> Tensor:
        """Apply the steps to a tensor."""
        for function, args, kwargs in self.steps:
            operand = functools.partial(_operand, tensor)
            tensor = function(*pytree.tree_map(operand, args), **pytree.tree_map(operand, kwargs))
        return tensor


@dataclasses.dataclass(frozen=True)
class Signature:
    """How a flat graph call corresponds to the model's call.

    `inputs` names the graph's user inputs in flat order; positions that hold a constant (None, bool, str, int) are inputs too,
    whose value the graph ignores. `sizes` says which sizes may change; None: none may. `read` holds the tensors whose values the
    model read in Python, by position among the inputs or by a buffer's name: the graph is right for these values alone.
    `readings` are such values of larger inputs. `read_at` is the first line that makes it so. `examples` holds what was kept of
    the inputs of the capture, by name: an export is checked with inputs like these. `autocast` lists the device types and dtypes
    of the autocast around the capture: the graph is right under the same one alone.
    """

    in_spec: TreeSpec
    out_spec: TreeSpec
    inputs: tuple[str, ...]
    sizes: DynamicSizes | None = None
    read: Mapping[int | str, Tensor] = dataclasses.field(default_factory=dict)
    readings: tuple[Reading, ...] = ()
    read_at: str = ""
    examples: Mapping[str, Example] = dataclasses.field(default_factory=dict)
    autocast: tuple[tuple[str, torch.dtype], ...] = ()

    @property
    def captured_sizes(self) -> dict[str, int]:
        """The dynamic sizes as they were when the model was captured, by symbol."""
        return {symbol.name: symbol.example for symbol in self.sizes.symbols} if self.sizes else {}

    @property
    def read_names(self) -> list[str]:
        """Names of the inputs and buffers whose values are constants of the graph."""
        return sorted({name if isinstance(name, str) else self.inputs[name] for name in (*self.read, *(r.source for r in self.readings))})

    @property
    def values(self) -> tuple[tuple[int, Hashable], ...]:
        """The values of a call that are constants of the graph, by position among the inputs."""
        found: dict[int, tuple[Any, ...]] = {}
        for i, value in [*self.read.items(), *((reading.source, reading.value) for reading in self.readings)]:
            if isinstance(i, int) and value is not None:
                found[i] = (*found.get(i, ()), *value.flatten().tolist())
        return tuple(found.items())
