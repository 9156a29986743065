"""From a module and example inputs to a flat graph that is proved to compute the same. The only caller of torch.export."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import operator
import traceback
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Interpreter
from torch.utils import _pytree as pytree

from bwcache_compile.compare import clone_tensors, difference, difference_from, flat_outputs
from bwcache_compile.dataflow import writes_escape
from bwcache_compile.errors import CaptureError, ConfigError, first_line
from bwcache_compile.known import KnownValues, source_line, sources
from bwcache_compile.program import CachedProgram, Captured, Signature
from bwcache_compile.sizes import open_sizes
from bwcache_compile.tracing import tracing

Mode = Literal["non-strict", "strict", "reading"]
"""Ways to trace, in the order in which they are tried; the last builds in what Python reads of masks and lengths."""


def _source_of(error: BaseException, model: nn.Module) -> str:
    """Find the line of the user's own code, or of the model's library, that stopped the capture."""
    return source_line(traceback.extract_tb(error.__traceback__)) or f"in {type(model).__name__}.forward"


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


def _arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return inspect.signature(model.forward).bind(*args, **kwargs).arguments


def _all_open(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Leave every size to the exporter to open: dimensions and Python ints. It fixes 0 and 1 always, so these are not asked for."""

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
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
            f"dynamic_shapes names {', '.join(map(repr, sorted(set(shapes) - set(names))))}, which this call of {type(model).__name__}"
            f" does not pass. It passes {', '.join(map(repr, names))}."
        )
    return {name: shapes.get(name) for name in names}


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any, mode: Mode) -> CachedProgram:
    known, values = KnownValues(), sources(model, args, kwargs) if mode == "reading" else {}
    with tracing():
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))  # it leaves marks on what it is given
        with contextlib.nullcontext() if mode == "strict" else known, known.knowing(model, values):
            exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=mode == "strict")
    program = flat_program(exported, type(model).__name__)
    read = {name: values[name].clone() for name in known.read}
    devices = sorted({leaf.device.type for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)})
    autocast = tuple((device, torch.get_autocast_dtype(device)) for device in devices if torch.is_autocast_enabled(device))
    return program.replace(signature=dataclasses.replace(program.signature, read=read, read_at=known.read_at, autocast=autocast))


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


def _is_zero(leaf: Any) -> bool:
    """Whether an example is of whole numbers, and none is above 0."""
    held = isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor) and leaf.device.type != "meta"
    return held and not leaf.is_floating_point() and not leaf.is_complex() and not bool((leaf.double() > 0).any())


def flat_program(exported: ExportedProgram, name: str) -> CachedProgram:
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
    zeros = frozenset(name for name, leaf in zip(names, leaves, strict=True) if _is_zero(leaf))
    signature = Signature(exported.call_spec.in_spec, exported.call_spec.out_spec, names, sizes, zeros=zeros)
    return CachedProgram(captured.module(), captured, signature, name)


def _check_repeatable(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], expected: list[Any]) -> None:
    """Tell a wrong capture from a model that differs from itself; only then is a second eager run worth its time."""
    with torch.no_grad():
        noise = difference(expected, flat_outputs(model(*clone_tensors(args), **clone_tensors(kwargs))))
    if noise is not None:
        raise CaptureError(
            f"{type(model).__name__} does not return the same twice for the same inputs: {noise}.\n"
            "  A capture cannot be checked against it. Either its forward draws random numbers or its kernels are not deterministic: take"
            " the randomness out, and call torch.use_deterministic_algorithms(True). Or it keeps state from call to call (a counter of"
            " steps, a cache of its own, an attribute that it writes): switch that off, or pass what it counts as an input."
        )


def _check_outputs(name: str, expected: list[Any]) -> None:
    """Refuse outputs that no graph returns."""
    for leaf in expected:
        if not isinstance(leaf, (Tensor, bool, int, float, str, type(None))):
            raise CaptureError(
                f"{name} returns a {type(leaf).__name__}, and a graph returns tensors, numbers, strings and None. Return the tensors that"
                " it holds, or register its class: torch.export.register_dataclass for a dataclass, else"
                " torch.utils._pytree.register_pytree_node."
            )


def capture(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any = None, reading: bool = False
) -> CachedProgram:
    """Capture a model as a flat graph over its own parameters.

    The model runs once eagerly first: exporting a model that never ran can damage it, and that run is the reference.
    Then non-strict export is tried, then strict, then one that builds in the values of masks and lengths that Python reads;
    a capture is used only if it returns the reference bit for bit.

    Args:
        model: In evaluation mode.
        args: Example positional arguments.
        kwargs: Example keyword arguments.
        dynamic_shapes: Which sizes stay open: "auto" for all that the model lets, else as `torch.export.export` takes
            it, where arguments that are left out are not open. None: every size is fixed.
        reading: Build in the values of masks and lengths from the start: sizes that depend on them are fixed then.

    Returns:
        The program; its weights are the model's own tensors. `signature.sizes` says which sizes it is proved for.

    Raises:
        CaptureError: No front end took the model, or what they captured computes something else.
    """
    name = type(model).__name__
    shapes = _all_open(model, args, kwargs) if dynamic_shapes == "auto" else _completed(model, args, kwargs, dynamic_shapes)
    with torch.no_grad():
        expected = flat_outputs(model(*clone_tensors(args), **clone_tensors(kwargs)))
    _check_outputs(name, expected)
    failures: list[str] = []
    stopped = reading
    for mode in get_args(Mode)[-1:] if reading else get_args(Mode):
        if mode == "reading" and not stopped:
            break
        try:
            with torch.no_grad():
                program = _export(model, args, kwargs, shapes, mode)
        except Exception as error:
            if mode == "reading":
                break
            # every front end raises its own kinds; they are reported together below
            stopped = True
            failures.append(f"{mode}: {type(error).__name__}: {first_line(error)}\n    at {_source_of(error, model)}")
            continue
        with torch.no_grad():
            flat, _ = pytree.tree_flatten((clone_tensors(args), clone_tensors(kwargs)))
            returned = list(program.compute(*flat))
        wrong = difference_from(model, args, kwargs, expected, returned)
        if wrong is None:
            return program
        if mode == "reading":
            break
        _check_repeatable(model, args, kwargs, expected)
        failures.append(f"{mode}: the captured graph computes something else than the model: {wrong}")
    raise CaptureError(
        f"{name} could not be captured as one graph.\n  "
        + "\n  ".join(failures)
        + "\n  Remove the data-dependent Python at that line (a branch on a tensor's values, .item(), .tolist(), .numpy()),"
        " or try a size that the model was built for. If the difference is a rounding error, the model chooses kernels itself"
        " (an attention back end that enters sdpa_kernel), which no graph keeps: choose them around the call instead."
    )
