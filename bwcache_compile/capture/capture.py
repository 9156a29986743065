"""Capture a module as a flat graph, and prove that the graph computes the same. The only caller of torch.export."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import SymInt, Tensor, nn

from bwcache_compile.capture.arguments import all_open, completed, leaf_names, signature_of, with_signature
from bwcache_compile.capture.flatten import flat_program
from bwcache_compile.capture.known import KnownValues
from bwcache_compile.capture.sources import Source, inputs_of, sources
from bwcache_compile.errors import CaptureError, first_line
from bwcache_compile.ir.call_signature import Reading
from bwcache_compile.ir.compare import Reference
from bwcache_compile.ir.program import ModelProgram
from bwcache_compile.ir.ranks import Agreement
from bwcache_compile.ir.sizes import CallSizes, VaryingSizes, hint
from bwcache_compile.ir.source_lines import class_files, error_line
from bwcache_compile.ir.torch_compat import pytree
from bwcache_compile.ir.tracing import tracing

Mode = Literal["non-strict", "strict", "reading"]
"""Ways to trace, in the order in which they are tried; "reading" makes constants of the masks and lengths that Python reads."""

_NAMED: dict[Mode, str] = {"non-strict": "non-strict", "strict": "strict", "reading": "non-strict, what Python reads as constants"}
_UNTRACED = (
    "Remove the data-dependent Python at that line (a branch on a tensor's values, .item(), .tolist(), .numpy()), or try a size that the"
    ' model was built for. If the model\'s code cannot be changed, transform(model, capture="region") captures its stacks of blocks alone.'
)
_DIFFERS = (
    "If the outputs differ by a rounding error, the model selects kernels itself (with sdpa_kernel, for example), which a graph cannot"
    ' record: select them around the call, or transform with verify="close". If they differ by more, torch.export traced the model'
    " wrongly: try a size that the model was built for."
)


@dataclasses.dataclass(frozen=True)
class _Failure:
    """Why a way to trace failed, and which inputs decide the values that Python read last."""

    error: Exception
    inputs: frozenset[int]

    def describe(self, mode: Mode, model: nn.Module, names: list[str]) -> str:
        """Return the mode, the error, the line of the model's own code, and the inputs."""
        at = error_line(self.error, class_files(model.modules()))
        lines = [
            f"{_NAMED[mode]}: {type(self.error).__name__}: {first_line(self.error)}",
            f"at {at}" if at else f"in {type(model).__name__}.forward",
        ]
        if self.inputs:
            lines.append(f"which reads values that depend on {', '.join(names[i] for i in sorted(self.inputs))}")
        return "\n    ".join(lines)


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], opened: Any, mode: Mode, values: dict[Source, Tensor]
) -> ModelProgram | _Failure:
    """Trace a model in one mode. Python may read `values`; if `opened` asks for all sizes, the sizes of these tensors stay fixed."""
    known = KnownValues()
    large = {i: leaf for i, leaf in inputs_of(args, kwargs).items() if i not in values} if mode == "reading" else {}
    shapes = all_open(model, args, kwargs, values.values()) if isinstance(opened, VaryingSizes) else opened
    with tracing():
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))  # torch.export leaves marks on its example tensors
        named = inspect.signature(model.forward) if shapes is None else signature_of(model, args, kwargs)
        try:
            with with_signature(model, named), contextlib.ExitStack() as stack:
                if mode != "strict":  # Dynamo traces hooks, and does not support such a mode
                    stack.enter_context(known)
                    stack.enter_context(known.knowing(model, values, large))
                exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=mode == "strict")
        except Exception as error:  # each front end raises errors of its own types
            return _Failure(error, known.asked)
    program = flat_program(exported, type(model).__name__)
    read = {name: values[name].clone() for name in known.read if not isinstance(name, Reading)}
    readings = tuple(reading for reading in known.read if isinstance(reading, Reading))
    devices = sorted({leaf.device.type for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)})
    autocast = tuple((device, torch.get_autocast_dtype(device)) for device in devices if torch.is_autocast_enabled(device))
    signature = dataclasses.replace(program.signature, read=read, readings=readings, read_at=known.read_at, autocast=autocast)
    return program.replace(signature=signature)


def _serves(program: ModelProgram, seen: Sequence[CallSizes]) -> bool:
    """Whether a program serves the sizes of all calls seen, but for sizes that became 0 or 1, which no exporter makes dynamic."""

    def opens(now: tuple[int, ...] | int | None, other: tuple[int, ...] | int | None) -> bool:
        pairs = zip(now, other, strict=True) if isinstance(now, tuple) and isinstance(other, tuple) else [(now, other)]
        return all(a == b or (isinstance(a, int) and isinstance(b, int) and min(a, b) > 1) for a, b in pairs)

    sizes = program.signature.sizes
    here = [
        tuple(map(hint, value.shape)) if isinstance(value, Tensor) else hint(value) if isinstance(value, (int, SymInt)) else None
        for value in (node.meta.get("val") for node in program.compute.graph.find_nodes(op="placeholder"))
    ]
    return all(
        sizes is not None and sizes.bind(other) is not None for other in seen if all(opens(a, b) for a, b in zip(here, other, strict=True))
    )


def _attempts(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], opened: Any, modes: Sequence[Mode], agreement: Agreement
) -> Iterator[tuple[Mode, ModelProgram | str]]:
    """Trace a model in each mode in turn, and yield what came of it: a program, or why there is none on some rank.

    A non-strict program that does not serve the sizes of all calls seen is yielded after the strict one. In the mode "reading",
    the sizes of all tensors that Python may read are fixed first; if the model reads only some of them, it is traced again with
    dynamic sizes of the others.
    """

    def attempt(mode: Mode, values: dict[Source, Tensor]) -> ModelProgram | _Failure:
        try:
            with torch.no_grad():
                return _export(model, args, kwargs, opened, mode, values)
        except Exception as error:  # flat_program refused what was exported
            return _Failure(error, frozenset())

    seen = opened.seen if isinstance(opened, VaryingSizes) else ()
    stopped, narrow = len(modes) == 1, None
    for mode in modes:
        if mode == "reading" and not stopped:
            return
        values = sources(model, args, kwargs) if mode == "reading" else {}
        traced = attempt(mode, values)
        if isinstance(opened, VaryingSizes) and isinstance(traced, ModelProgram) and values.keys() - traced.signature.read.keys():
            wider = attempt(mode, {name: values[name] for name in traced.signature.read})
            traced = wider if isinstance(wider, ModelProgram) else traced
        failure = traced.describe(mode, model, leaf_names(model, args, kwargs)) if isinstance(traced, _Failure) else None
        failure = agreement.joint(failure)
        outcome = traced if failure is None and isinstance(traced, ModelProgram) else str(failure)
        stopped = stopped or isinstance(outcome, str)
        serves = isinstance(outcome, ModelProgram) and _serves(outcome, seen)
        if mode == "non-strict" and isinstance(outcome, ModelProgram) and not serves:
            narrow = outcome  # non-strict tracing makes a constant of int(size ** 0.5)
            continue
        if narrow is None or serves:
            yield mode, outcome
        if narrow is not None:
            yield "non-strict", narrow
            narrow = None


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any = None,
    reading: bool = False,
    reference: Reference | None = None,
    run: Callable[[ModelProgram], list[Any]] | None = None,
) -> ModelProgram:
    """Capture a model as a flat graph over its own parameters.

    The model runs once eagerly first: exporting a model that never ran can damage it, and that run is the reference.
    Then non-strict export is tried, then strict, then one that builds in the values of masks and lengths that Python reads;
    a capture is used only if it returns the reference bit for bit.

    Args:
        model: In evaluation mode.
        args: Example positional arguments.
        kwargs: Example keyword arguments.
        dynamic_shapes: Which sizes stay open: "auto" or `VaryingSizes` for all that the model lets, else as `torch.export.export` takes
            it, where arguments that are left out are not open. None: every size is fixed.
        reading: Build in the values of masks and lengths from the start: sizes that depend on them are fixed then.
        reference: The model's outputs for this call, and how a capture is compared with them.
        run: Run what is made of a capture, which it may consume, and return its flat outputs; by default the graph as captured runs.

    Returns:
        The program; its weights are the model's own tensors. `signature.sizes` says which sizes it is proved for.

    Raises:
        CaptureError: No front end took the model, or what they captured computes something else.
    """
    name = type(model).__name__
    opened = VaryingSizes() if dynamic_shapes == "auto" else dynamic_shapes
    if not isinstance(opened, VaryingSizes):
        opened = completed(model, args, kwargs, opened)
    if reference is None:
        reference = Reference(model, args, kwargs)
    if reference.verify:
        reference.outputs()
    failures: list[str] = []
    advice: list[str] = []
    modes = get_args(Mode)[-1:] if reading else get_args(Mode)
    for mode, outcome in _attempts(model, args, kwargs, opened, modes, reference.agreement):
        if isinstance(outcome, str):
            failures.append(outcome)
            advice.append(_UNTRACED)
            continue
        if not reference.verify:
            return outcome
        with torch.no_grad():
            returned = run(outcome) if run is not None else list(outcome.compute(*reference.inputs()))
        wrong = reference.difference(returned)
        if wrong is None:
            return outcome
        reference.check_repeatable()
        failures.append(f"{_NAMED[mode]}: the outputs of the captured graph differ from the model's: {wrong}")
        advice.append(_DIFFERS)
    raise CaptureError("\n  ".join([f"could not capture {name} as one graph.", *failures, *dict.fromkeys(advice)]))
