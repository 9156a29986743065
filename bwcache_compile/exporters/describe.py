"""What a manifest says about a program: its call, its state, its policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from bwcache_compile.config import policy_dtype
from bwcache_compile.errors import BundleError, ExportError
from bwcache_compile.exporters.arithmetic import arithmetic
from bwcache_compile.exporters.call import graph_shape
from bwcache_compile.layout import slot_order
from bwcache_compile.program import CachedProgram, CacheSlot
from bwcache_compile.sizes import hint_shape, shape_of


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name as numpy has it."""
    return str(dtype).removeprefix("torch.")


def _places(tree: Any, path: tuple[int | str, ...] = ()) -> Iterator[tuple[tuple[int | str, ...], int]]:
    """Yield the path and the position of every leaf of a tree whose leaves are their positions."""
    inside: Any
    if isinstance(tree, int):
        yield path, tree
        return
    if isinstance(tree, Mapping):
        inside = tree.items()
    elif isinstance(tree, (list, tuple)):
        inside = enumerate(tree)
    elif dataclasses.is_dataclass(tree):
        inside = [(field.name, getattr(tree, field.name)) for field in dataclasses.fields(tree)]
    else:
        inside = enumerate(pytree.tree_leaves(tree))
    for key, value in inside:
        yield from _places(value, (*path, key if isinstance(key, int) else str(key)))


def describe_inputs(program: CachedProgram, parameters: tuple[str, ...]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the tensors that a call passes, and its constants, each with the argument that holds it and the path inside.

    Args:
        program: Past planning.
        parameters: Names of the parameters of the model's forward.
    """
    spec, names = program.signature.in_spec, program.signature.inputs
    places = sorted(_places(pytree.tree_unflatten(list(range(spec.num_leaves)), spec)), key=lambda place: place[1])
    nodes = program.compute.graph.find_nodes(op="placeholder")[: len(names)]
    tensors, constants = [], []
    for (path, _), name, node in zip(places, names, nodes, strict=True):
        outer, first, *inner = path
        by_position = outer == 0 and isinstance(first, int) and first < len(parameters)
        argument = parameters[int(first)] if by_position else str(first)
        place = {"argument": argument, "path": inner}
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            described = {"dtype": dtype_name(value.dtype), "shape": list(shape_of(value)), "example": list(hint_shape(value))}
            tensors.append({"name": name, **place, **described})
        else:
            constants.append({**place, "value": value if isinstance(value, (bool, int, float, str)) else None})
    return tensors, constants


def describe_outputs(program: CachedProgram) -> tuple[dict[str, Any], list[Node]]:
    """Return how the model's output is put together, and the nodes that are its tensors."""
    spec = program.signature.out_spec
    returned: Any = program.compute.graph.output_node().args[0]
    whole = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    places = sorted(_places(whole), key=lambda place: place[1])
    nested = any(len(path) > 1 for path, _ in places)
    kind = "tensor" if isinstance(whole, int) else "tuple" if nested or isinstance(whole, (tuple, list)) else "mapping"
    taken = {*program.signature.inputs, "step", "reuse_left", "indicator"}
    items, nodes = [], []
    for (path, i), node in zip(places, returned[: spec.num_leaves], strict=True):
        if not isinstance(node, Node):
            continue
        key = "_".join(map(str, path))
        name = f"output_{key}" if not key or key[0].isdigit() else key
        name = f"{name.rstrip('_')}.out" if name in taken else name.rstrip("_")
        taken.add(name)
        value = node.meta["val"]
        items.append({"name": name, "key": key, "position": i, "dtype": dtype_name(value.dtype), "shape": list(shape_of(value))})
        nodes.append(node)
    return {"kind": kind, "length": spec.num_leaves, "items": items}, nodes


def _describe_slot(slot: CacheSlot) -> dict[str, Any]:
    place = {"name": slot.name, "role": slot.role, "dtype": dtype_name(slot.dtype)}
    return {**place, "shape": list(slot.shape), "example": list(slot.example), "fill": slot.fill}


def _policy(program: CachedProgram, num_steps: int) -> dict[str, Any]:
    config = program.planned().config
    parameters = [
        {"name": name, "dtype": policy_dtype(name), "shape": [len(value)], "default": list(value)}
        for name, value in config.policy_values(config.steps or num_steps).items()
    ]
    return {"kind": config.policy, "parameters": parameters}


def check_sizes(program: CachedProgram, conditions: list[str], sizes: list[int | str]) -> None:
    """Refuse what a session could not evaluate, or would not find true at the captured sizes.

    Raises:
        ExportError: A size is more than integer arithmetic, or a condition does not hold.
    """
    known = program.signature.sizes.examples if program.signature.sizes else {}
    for text in [*conditions, *sizes]:
        try:
            holds = arithmetic(text, known)
        except BundleError as error:
            raise ExportError(f"the size {text!r} of {program.model_name} is no integer arithmetic; export it with fixed sizes.") from error
        if text in conditions and not holds:
            raise ExportError(f"{program.model_name} would be exported for sizes where {text}, which those at hand do not meet: {known}.")


def describe(program: CachedProgram, parameters: tuple[str, ...]) -> dict[str, Any]:
    """Return everything that a manifest says before any file is written.

    Raises:
        ExportError: A size is more than integer arithmetic.
    """
    plan, sizes = program.planned(), program.signature.sizes
    inputs, constants = describe_inputs(program, parameters)
    outputs, _ = describe_outputs(program)
    symbols = []
    for symbol in sizes.symbols if sizes else ():
        if symbol.dimension is None:
            continue  # an int: its inputs are refused or ignored
        symbols.append({**dataclasses.asdict(symbol), "input": program.signature.inputs[symbol.position]})
    conditions = list(sizes.conditions) if sizes else []
    slots = [_describe_slot(slot) for slot in plan.slots]
    check_sizes(program, conditions, [size for entry in [*inputs, *outputs["items"], *slots] for size in entry["shape"]])
    return {
        "model": program.model_name,
        "torch": torch.__version__.partition("+")[0],
        "arguments": list(parameters),
        "inputs": inputs,
        "constants": constants,
        "outputs": outputs,
        "symbols": symbols,
        "conditions": conditions,
        "slots": slots,
        "policy": _policy(program, num_steps=50),
        "config": dataclasses.asdict(plan.config),
        "blocks": [{"name": block.name, "type": block.module_type} for block in plan.blocks],
        "measured": [measured.block for measured in plan.measured],
        "notes": list(plan.notes),
    }


def add_layout(content: dict[str, Any], program: CachedProgram) -> None:
    """Say on which device the graphs run, and how each input and slot lies in memory: compiled code depends on it."""
    plan = program.planned()
    content["device"] = str(plan.device)
    nodes = {node.name: node for node in program.compute.graph.find_nodes(op="placeholder")}
    for entry in content["inputs"]:
        entry["order"] = list(slot_order(nodes[entry["name"]].meta["val"]))
    for entry, slot in zip(content["slots"], plan.slots, strict=True):
        entry["order"] = list(slot.order)


def declared_shapes(content: dict[str, Any]) -> dict[str, list[int | str]]:
    """Return the shapes of everything that goes in or out of a graph, by the name that it has there."""
    shapes = {entry["name"]: entry["shape"] for entry in content["outputs"]["items"]}
    shapes |= {entry["name"]: graph_shape(entry) for entry in content["inputs"]}
    shapes |= {f"{way}.{slot['name']}": slot["shape"] for slot in content["slots"] for way in ("cache_in", "cache_out")}
    shapes |= {f"policy.{entry['name']}": entry["shape"] for entry in content["policy"]["parameters"]}
    return shapes | {"step": [1], "reuse_left": [1], "indicator": [len(content["measured"])]}
