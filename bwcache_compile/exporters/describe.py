"""Describe a program for the manifest: its call, its state, its policy."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from bwcache_compile.bundle.arithmetic import arithmetic
from bwcache_compile.bundle.call import graph_shape
from bwcache_compile.bundle.manifest import (
    BlockEntry,
    ConstantEntry,
    InputEntry,
    Manifest,
    OutputsEntry,
    Size,
    SlotEntry,
    SymbolEntry,
    TensorEntry,
    ValueEntry,
)
from bwcache_compile.bundle.settings import policy_inputs
from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import BundleError, ExportError
from bwcache_compile.graph_io import INDICATOR, REUSE_LEFT, STEP, cache_in, cache_out
from bwcache_compile.ir.layout import slot_order
from bwcache_compile.ir.plan import CacheSlot
from bwcache_compile.ir.program import ModelProgram
from bwcache_compile.ir.sizes import Symbol, hint_shape, shape_of
from bwcache_compile.ir.tree_paths import leaf_paths, positions


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name as numpy has it."""
    return str(dtype).removeprefix("torch.")


def _constant(value: Any, said: str, program: ModelProgram) -> Any:
    """Return a constant as a manifest stores it.

    Raises:
        ExportError: A manifest cannot store such a value.
    """
    if isinstance(value, enum.Enum) and not isinstance(value, (int, str)):  # a session takes the member, its value or its name
        return _constant(value.value if isinstance(value.value, (int, float, str)) else value.name, said, program)
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ExportError(f"{program.model_name} {said}; a bundle supports tensors, None, strings and finite numbers.")


def describe_values(program: ModelProgram) -> tuple[ValueEntry, ...]:
    """Return the values of inputs that are built into the graphs, since Python read them: one flat list for each.

    Raises:
        ExportError: A manifest cannot hold one of them.
    """
    names, described = program.io("compute").users, []
    if program.signature.readings:
        raise ExportError(
            f"{program.model_name} reads in Python a value that it computes from {names[program.signature.readings[0].source]}, which a"
            f" bundle cannot check at later calls.\n    at {program.signature.read_at}\n"
            "  Remove that branch from the model's forward: decide it before the call, and pass a bool."
        )
    for i, value in program.signature.read.items():
        if not isinstance(i, int):
            continue
        numbers = value.flatten().tolist()
        finite = all(isinstance(number, (bool, int, float)) and math.isfinite(number) for number in numbers)
        if value.dtype == torch.bfloat16 or not finite:
            raise ExportError(
                f"{program.model_name} reads the values of {names[i]} in Python, and a bundle cannot store these:"
                f" {dtype_name(value.dtype)} {numbers[:4]}.\n    at {program.signature.read_at}\n"
                "  Pass finite numbers, in another dtype than bfloat16 or complex64."
            )
        described.append(ValueEntry(input=names[i], value=tuple(numbers)))
    return tuple(described)


def _call(program: ModelProgram) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call's arguments with their positions as leaves."""
    args, kwargs = positions(program.signature.in_spec)
    return args, kwargs


def describe_inputs(program: ModelProgram, parameters: tuple[str, ...]) -> tuple[tuple[InputEntry, ...], tuple[ConstantEntry, ...]]:
    """Return the tensors that a call passes, and its constants, each with the argument that holds it and the path inside.

    Args:
        program: Past planning.
        parameters: Names of what the model's forward takes by position; `*args` go by their places.
    """
    names, paths = program.io("compute").users, leaf_paths(program.signature.in_spec)
    nodes = program.compute.graph.find_nodes(op="placeholder")[: len(names)]
    tensors, constants = [], []
    for path, name, node in zip(paths, names, nodes, strict=True):
        outer, first, *inner = path
        by_position = outer == 0 and isinstance(first, int) and first < len(parameters)
        argument = parameters[int(first)] if by_position else str(first)
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            shape, example, dtype = shape_of(value), hint_shape(value), dtype_name(value.dtype)
            tensors.append(InputEntry(name=name, argument=argument, path=tuple(inner), dtype=dtype, shape=shape, example=example))
        else:
            built_in = _constant(value, f"takes {value!r} as {argument}", program)
            constants.append(ConstantEntry(argument=argument, path=tuple(inner), value=built_in))
    return tuple(tensors), tuple(constants)


def _form(tree: Any, leaves: list[dict[str, Any]], program: ModelProgram) -> dict[str, Any]:
    """Describe the structure of an output; the leaves of the tree are positions in `leaves`.

    Raises:
        ExportError: The structure is not one that a manifest supports.
    """
    if isinstance(tree, int):
        return leaves[tree]
    if tree is None:
        return {"value": None}
    if isinstance(tree, Mapping) and all(isinstance(key, str) for key in tree):
        return {"mapping": {key: _form(value, leaves, program) for key, value in tree.items()}}
    if dataclasses.is_dataclass(tree):
        return {"mapping": {field.name: _form(getattr(tree, field.name), leaves, program) for field in dataclasses.fields(tree)}}
    if isinstance(tree, (list, tuple)):
        return {"list" if isinstance(tree, list) else "tuple": [_form(value, leaves, program) for value in tree]}
    raise ExportError(
        f"{program.model_name} returns a {type(tree).__name__}"
        f"{' with keys that are not strings' if isinstance(tree, Mapping) else ''}; a bundle supports tuples, lists and dicts"
        " with string keys.\n"
        "  Wrap the model in a module that returns one of these."
    )


def describe_outputs(program: ModelProgram) -> OutputsEntry:
    """Return the model's output.

    Raises:
        ExportError: It holds a dynamic Python number, or something else that a manifest does not.
    """
    io, returned = program.io("compute"), program.compute.graph.output_node().args[0]
    assert isinstance(returned, (list, tuple))
    named, items, leaves = io.unpack(returned), [], []
    for name in io.results:
        node = named[name]
        value = node.meta["val"] if isinstance(node, Node) else node
        if not isinstance(value, Tensor):
            leaves.append({"value": _constant(value, f"returns {'the dynamic size ' * isinstance(value, torch.SymInt)}{value!r}", program)})
            continue
        items.append(TensorEntry(name=name, dtype=dtype_name(value.dtype), shape=shape_of(value)))
        leaves.append({"tensor": name})
    return OutputsEntry(form=_form(positions(program.signature.out_spec), leaves, program), items=tuple(items))


def _describe_slot(slot: CacheSlot) -> SlotEntry:
    dtype = dtype_name(slot.dtype)
    return SlotEntry(name=slot.name, role=slot.role, dtype=dtype, shape=slot.shape, example=slot.example, fill=slot.fill)


def _describe_symbol(symbol: Symbol, read_from: str) -> SymbolEntry:
    assert symbol.dimension is not None, "a dynamic Python number was refused"
    return SymbolEntry(
        name=symbol.name,
        input=read_from,
        dimension=symbol.dimension,
        example=symbol.example,
        factor=symbol.factor,
        offset=symbol.offset,
    )


def check_sizes(program: ModelProgram, conditions: Sequence[str], sizes: Iterable[Size]) -> None:
    """Refuse sizes and conditions that a session could not evaluate, and conditions that are false at the captured sizes.

    Raises:
        ExportError: A size is more than integer arithmetic, or a condition does not hold.
    """
    known = program.signature.captured_sizes
    for text in [*conditions, *sizes]:
        try:
            holds = arithmetic(text, known)
        except BundleError as error:
            raise ExportError(
                f"the size {text!r} of {program.model_name} cannot be computed from the sizes of its inputs by integer arithmetic.\n"
                "  If it depends on the values of a tensor (`u0`), pass them as Python numbers, or cut the output outside the model;"
                " else transform with dynamic_shapes=None, which fixes every size."
            ) from error
        if text in conditions and not holds:
            raise ExportError(f"shape constraint violated: the exported graphs of {program.model_name} require {text}, got {known}.")


def describe(
    program: ModelProgram, config: CacheConfig, parameters: tuple[str, ...], *, graph_format: str, opset: int | None = None
) -> Manifest:
    """Return a manifest that lacks only the graphs, the files, and the result of their check.

    Raises:
        ExportError: A size is more than integer arithmetic.
    """
    plan, sizes = program.planned(), program.signature.sizes
    parameters = (*parameters, *map(str, range(len(parameters), len(_call(program)[0]))))
    inputs, constants = describe_inputs(program, parameters)
    outputs = describe_outputs(program)
    users, symbols = program.io("compute").users, sizes.symbols if sizes else ()
    conditions = sizes.conditions if sizes else ()
    slots = tuple(map(_describe_slot, plan.slots))
    check_sizes(program, conditions, (size for entry in (*inputs, *outputs.items, *slots) for size in entry.shape))
    return Manifest(
        model=program.model_name,
        graph_format=graph_format,
        opset=opset,
        torch=torch.__version__.partition("+")[0],
        arguments=parameters,
        inputs=inputs,
        constants=constants,
        values=describe_values(program),
        outputs=outputs,
        symbols=tuple(_describe_symbol(symbol, users[symbol.position]) for symbol in symbols),
        conditions=tuple(conditions),
        slots=slots,
        config=config,
        blocks=tuple(BlockEntry(name=block.name, type=block.module_type) for block in plan.blocks),
        measured=tuple(measured.block for measured in plan.measured),
        notes=tuple(plan.notes),
        graphs={},
        self_check={},
        files={},
    )


def with_layout(manifest: Manifest, program: ModelProgram) -> Manifest:
    """Say on which device the graphs run, and how each input and slot lies in memory: compiled code depends on it."""
    plan = program.planned()
    nodes = dict(zip(program.io("compute").users, program.compute.graph.find_nodes(op="placeholder"), strict=False))
    inputs = (dataclasses.replace(entry, order=slot_order(nodes[entry.name].meta["val"])) for entry in manifest.inputs)
    slots = (dataclasses.replace(entry, order=slot.order) for entry, slot in zip(manifest.slots, plan.slots, strict=True))
    return dataclasses.replace(manifest, device=str(plan.device), inputs=tuple(inputs), slots=tuple(slots))


def declared_shapes(manifest: Manifest) -> dict[str, Sequence[Size]]:
    """Return the shapes of everything that goes in or out of a graph, by the name that it has there."""
    shapes: dict[str, Sequence[Size]] = {entry.name: entry.shape for entry in manifest.outputs.items}
    shapes |= {entry.name: graph_shape(entry) for entry in manifest.inputs}
    shapes |= {name(slot.name): slot.shape for slot in manifest.slots for name in (cache_in, cache_out)}
    shapes |= {entry.name: entry.shape for entry in policy_inputs(manifest.config)}
    return shapes | {STEP: [1], REUSE_LEFT: [1], INDICATOR: [len(manifest.measured)]}
