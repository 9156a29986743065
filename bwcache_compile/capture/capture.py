"""From a module and example inputs to a flat graph that is proved to compute the same. The only caller of torch.export."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import SymInt, Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Interpreter

from bwcache_compile.capture.known import KnownValues, Source, inputs_of, sources
from bwcache_compile.errors import CaptureError, ConfigError, first_line
from bwcache_compile.ir.call_signature import Reading, Signature
from bwcache_compile.ir.compare import Reference
from bwcache_compile.ir.dataflow import writes_escape
from bwcache_compile.ir.examples import keep_examples
from bwcache_compile.ir.program import Captured, ModelProgram
from bwcache_compile.ir.sizes import CallSizes, VaryingSizes, hint, open_sizes
from bwcache_compile.ir.source_lines import class_files, error_line
from bwcache_compile.ir.torch_compat import HigherOrderOperator, pytree
from bwcache_compile.ir.tracing import tracing

Mode = Literal["non-strict", "strict", "reading"]
"""Ways to trace, in the order in which they are tried; the last builds in what Python reads of masks and lengths."""


@dataclasses.dataclass(frozen=True)
class _Failure:
    """Why a way to trace failed, and which inputs decide the values that Python read last."""

    error: Exception
    inputs: frozenset[int]

    def describe(self, mode: Mode, model: nn.Module, names: list[str]) -> str:
        """Name the way, the error, the line of the model's own code, and the inputs."""
        at = error_line(self.error, class_files(model.modules()))
        lines = [
            f"{mode}: {type(self.error).__name__}: {first_line(self.error)}",
            f"at {at}" if at else f"in {type(model).__name__}.forward",
        ]
        if self.inputs:
            lines.append(f"which reads values that depend on {', '.join(names[i] for i in sorted(self.inputs))}")
        return "\n    ".join(lines)


def _leaf_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Name each leaf of a call after the argument that it belongs to."""
    by_position = [name for name, p in inspect.signature(model.forward).parameters.items() if p.kind != inspect.Parameter.VAR_KEYWORD]
    found = []
    for path, _ in pytree.tree_leaves_with_path((args, kwargs)):
        key = path[1]
        name = getattr(key, "key", None) or (by_position[key.idx] if key.idx < len(by_position) else f"argument {key.idx}")  # type: ignore[attr-defined]
        found.append(f"{name}{pytree.keystr(path[2:])}")
    return found


def _unlifted(exported: ExportedProgram) -> Captured:
    """Read weights where they are used instead of passing them in.

    `ExportedProgram.module()` does this too, and is taken where the model writes to its inputs or buffers; elsewhere it
    only costs time, as it writes the graph out as Python several times over.
    """
    signature = exported.graph_signature
    kinds = {spec.kind for spec in signature.input_specs}
    plain = {InputKind.USER_INPUT, InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}
    graph = Graph()
    if not kinds <= plain or signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        root: Any = exported.module(check_guards=False)
        returned: Any = graph.graph_copy(root.graph, {})
        tensors = {}
    else:
        root, tensors, copies = exported.graph_module, {**exported.constants, **exported.state_dict}, {}
        for spec, node in zip(signature.input_specs, exported.graph.find_nodes(op="placeholder"), strict=True):
            if spec.kind != InputKind.USER_INPUT:
                copies[node] = graph.get_attr(str(spec.target))
                copies[node].meta["val"] = node.meta["val"]
        returned = graph.graph_copy(exported.graph, copies)
    graph.output(tuple(returned) if isinstance(returned, (list, tuple)) else (returned,))
    names = [str(node.target) for node in graph.find_nodes(op="get_attr")]
    return Captured(graph, {name: tensors[name] if name in tensors else operator.attrgetter(name)(root) for name in names})


def _signature(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.Signature:
    """Return the signature of a model's forward with a parameter for each keyword that it takes by `**kwargs` in this call."""
    signature = inspect.signature(model.forward)
    own = [p for name, p in signature.parameters.items() if p.kind != inspect.Parameter.VAR_KEYWORD]
    if len(own) == len(signature.parameters):
        return signature
    names = [name for name in kwargs if name not in {p.name for p in own}]
    return signature.replace(parameters=[*own, *(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names)])


def _arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return _signature(model, args, kwargs).bind(*args, **kwargs).arguments


@contextlib.contextmanager
def _with_signature(model: nn.Module, signature: inspect.Signature) -> Iterator[None]:
    """Let a model's forward have a signature meanwhile: torch.export opens no size of what is taken by `**kwargs`."""
    if signature == inspect.signature(model.forward):
        yield
        return
    forward, own = model.forward, vars(model).get("forward")

    def explicit(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    vars(explicit)["__signature__"] = signature
    vars(model)["forward"] = explicit
    try:
        yield
    finally:
        del vars(model)["forward"]
        if own is not None:
            vars(model)["forward"] = own


def _all_open(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], fixed: Iterable[Tensor]) -> dict[str, Any]:
    """Leave every size to the exporter to open: dimensions and Python ints. It fixes 0 and 1 always, so these are not asked for.

    The sizes of the tensors in `fixed` stay fixed.
    """
    kept = set(map(id, fixed))

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and id(leaf) not in kept:
            return {i: Dim.AUTO for i, size in enumerate(leaf.shape) if size > 1}
        return Dim.AUTO if type(leaf) is int and leaf > 1 else None

    return pytree.tree_map(of_leaf, _arguments(model, args, kwargs))


def _completed(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> Any:
    """Fix the sizes of the arguments that a specification by name leaves out."""
    if not isinstance(shapes, dict):
        return shapes
    names = _arguments(model, args, kwargs)
    if set(shapes) - set(names):
        raise ConfigError(
            f"dynamic_shapes names {', '.join(map(repr, sorted(set(shapes) - set(names))))}, but this call of {type(model).__name__}"
            f" passes only {', '.join(map(repr, names))}."
        )
    return {name: shapes.get(name) for name in names}


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], opened: Any, mode: Mode, values: dict[Source, Tensor]
) -> ModelProgram | _Failure:
    """Trace a model in one way; Python may read `values`, and where `opened` asks for all sizes, theirs stay fixed."""
    known = KnownValues()
    large = {i: leaf for i, leaf in inputs_of(args, kwargs).items() if i not in values} if mode == "reading" else {}
    shapes = _all_open(model, args, kwargs, values.values()) if isinstance(opened, VaryingSizes) else opened
    with tracing():
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))  # it leaves marks on what it is given
        named = inspect.signature(model.forward) if shapes is None else _signature(model, args, kwargs)
        try:
            with _with_signature(model, named), contextlib.ExitStack() as stack:
                if mode != "strict":  # Dynamo traces hooks, and takes no such mode
                    stack.enter_context(known)
                    stack.enter_context(known.knowing(model, values, large))
                exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=mode == "strict")
        except Exception as error:  # every front end raises its own kinds
            return _Failure(error, known.asked)
    program = flat_program(exported, type(model).__name__)
    read = {name: values[name].clone() for name in known.read if not isinstance(name, Reading)}
    readings = tuple(reading for reading in known.read if isinstance(reading, Reading))
    devices = sorted({leaf.device.type for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)})
    autocast = tuple((device, torch.get_autocast_dtype(device)) for device in devices if torch.is_autocast_enabled(device))
    signature = dataclasses.replace(program.signature, read=read, readings=readings, read_at=known.read_at, autocast=autocast)
    return program.replace(signature=signature)


def _serves(program: ModelProgram, seen: Sequence[CallSizes]) -> bool:
    """Whether a program serves all sizes seen that dynamic sizes may serve: no exporter opens a size of 0 or 1."""

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
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], opened: Any, modes: Sequence[Mode]
) -> Iterator[tuple[Mode, ModelProgram | _Failure]]:
    """Trace a model in one way after the other; strict tracing comes first where it alone leaves the sizes seen open.

    When values are built in, the sizes of all tensors that Python may read are fixed first. If the model reads only some of them,
    it is traced again with the sizes of the others open.
    """

    def attempt(mode: Mode, values: dict[Source, Tensor]) -> ModelProgram | _Failure:
        try:
            with torch.no_grad():
                return _export(model, args, kwargs, opened, mode, values)
        except Exception as error:  # what was exported opens no size, or decomposes into nothing that is supported
            return _Failure(error, frozenset())

    seen = opened.seen if isinstance(opened, VaryingSizes) else ()
    stopped, narrow = len(modes) == 1, None
    for mode in modes:
        if mode == "reading" and not stopped:
            return
        values = sources(model, args, kwargs) if mode == "reading" else {}
        outcome = attempt(mode, values)
        if isinstance(opened, VaryingSizes) and isinstance(outcome, ModelProgram) and values.keys() - outcome.signature.read.keys():
            wider = attempt(mode, {name: values[name] for name in outcome.signature.read})
            outcome = wider if isinstance(wider, ModelProgram) else outcome
        stopped = stopped or isinstance(outcome, _Failure)
        serves = isinstance(outcome, ModelProgram) and _serves(outcome, seen)
        if mode == "non-strict" and isinstance(outcome, ModelProgram) and not serves:
            narrow = outcome  # int(size ** 0.5) is a number in there
            continue
        if narrow is None or serves:
            yield mode, outcome
        if narrow is not None:
            yield "non-strict", narrow
            narrow = None


def _runs_under_modes(module: GraphModule) -> bool:
    """Whether a graph runs others under autocast or another mode of gradients: blocks in there are out of sight."""
    return any(isinstance(node.target, HigherOrderOperator) and "wrap_with" in str(node.target) for node in module.graph.nodes)


def _functional(exported: ExportedProgram) -> ExportedProgram:
    """Return the same operators, in-place ones apart, with what runs under a mode written out: an autocast becomes casts."""
    nested = [m for m in exported.graph_module.modules() if isinstance(m, GraphModule) and m is not exported.graph_module]
    for module in nested:
        vars(module)["forward"] = Interpreter(module).run  # node by node, so that each operator says which module it ran in
    try:
        return exported.run_decompositions({})
    finally:
        for module in nested:
            del vars(module)["forward"]


def flat_program(exported: ExportedProgram, name: str) -> ModelProgram:
    """Return an exported program as a flat graph over its own weights; nothing runs, nothing is checked.

    Where blocks write in place to more than their own memory, or run under a mode, the graph is the functional one.
    """
    with tracing():
        if _runs_under_modes(exported.graph_module) or writes_escape(exported.graph_module):
            exported = _functional(exported)
        captured = _unlifted(exported)
    inputs = captured.graph.find_nodes(op="placeholder")
    sizes = open_sizes([node.meta.get("val") for node in inputs], exported.range_constraints)
    names = tuple(node.name for node in inputs)
    leaves = pytree.tree_leaves(exported.example_inputs) if exported.example_inputs else [None] * len(names)
    examples = keep_examples(names, leaves)
    signature = Signature(exported.call_spec.in_spec, exported.call_spec.out_spec, names, sizes, examples=examples)
    return ModelProgram(captured.module(), captured, signature, name)


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
        opened = _completed(model, args, kwargs, opened)
    if reference is None:
        reference = Reference(model, args, kwargs)
    if reference.verify:
        reference.outputs()
    failures: list[str] = []
    modes = get_args(Mode)[-1:] if reading else get_args(Mode)
    for mode, outcome in _attempts(model, args, kwargs, opened, modes):
        if isinstance(outcome, _Failure):
            failures.append(outcome.describe(mode, model, _leaf_names(model, args, kwargs)))
            continue
        if not reference.verify:
            return outcome
        with torch.no_grad():
            returned = run(outcome) if run is not None else list(outcome.compute(*reference.inputs()))
        wrong = reference.difference(returned)
        if wrong is None:
            return outcome
        reference.check_repeatable()
        failures.append(f"{mode}: the captured graph computes something else than the model: {wrong}")
    raise CaptureError(
        f"could not capture {name} as one graph.\n  "
        + "\n  ".join(failures)
        + "\n  Remove the data-dependent Python at that line (a branch on a tensor's values, .item(), .tolist(), .numpy()),"
        " or try a size that the model was built for. If the outputs differ by a rounding error, the model selects kernels itself"
        " (with sdpa_kernel, for example), which a graph cannot record: select them around the call instead."
    )
