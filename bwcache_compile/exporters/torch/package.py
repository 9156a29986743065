"""Write plain graphs as exported programs, or compile them by AOTInductor. Their weights are stored beside them, once.

`torch.export.save` and AOTInductor would store the weights in each file, and so those that two graphs read twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec
from torch.fx import GraphModule

from bwcache_compile.errors import ExportError, first_line
from bwcache_compile.exporters.graphs import PlainGraph, exported_program
from bwcache_compile.ir import torch_compat
from bwcache_compile.ir.program import REGION_MARK
from bwcache_compile.ir.sizes import print_expression
from bwcache_compile.ir.torch_compat import ShapeEnv, pytree
from bwcache_compile.ir.tracing import tracing

_KEPT = ("val", "custom")


@dataclasses.dataclass(frozen=True)
class TorchGraph:
    """One graph as a program that holds no weights: they are its first inputs.

    Attributes:
        kind: `compute` or `reuse`.
        exported: The program.
        tensors: Its weights by name, in the order of the inputs.
    """

    kind: str
    exported: ExportedProgram
    tensors: dict[str, Tensor]

    @property
    def region(self) -> dict[str, str]:
        """Of each operator that came from the cached region: its name here, and the node it was."""
        return {name: origin["bwcache_node"] for name, origin in _origins(self.exported) if origin.get(REGION_MARK)}

    @property
    def unmarked(self) -> int:
        """How many operators do not say where they come from."""
        return sum(not origin for _, origin in _origins(self.exported))

    @property
    def weights(self) -> set[str]:
        """Names of the weights that it reads."""
        return set(self.tensors)


def _graph_modules(exported: ExportedProgram) -> Iterator[GraphModule]:
    return (module for module in exported.graph_module.modules() if isinstance(module, GraphModule))


def _origins(exported: ExportedProgram) -> Iterator[tuple[str, dict[str, Any]]]:
    for module in _graph_modules(exported):
        for node in module.graph.nodes:
            if node.op == "call_function":
                yield node.name, node.meta.get("custom", {})


def dynamic_sizes(values: list[Any]) -> tuple[ShapeEnv | None, dict[Any, Any]]:
    """Return where the dynamic sizes among some values live, and the range of each."""
    leaves = pytree.tree_leaves(values)
    shapes = [tuple(value.shape) if isinstance(value, Tensor) else (value,) for value in leaves]
    sizes: list[Any] = [size for shape in shapes for size in shape if isinstance(size, SymInt)]
    symbols = {symbol for size in sizes for symbol in size.node.expr.free_symbols}
    if not symbols:
        return None, {}
    env = sizes[0].node.shape_env
    return env, {symbol: env.var_to_range[symbol] for symbol in sorted(symbols, key=str) if symbol in env.var_to_range}


def torch_graph(plain: PlainGraph) -> TorchGraph:
    """Return a graph as a program whose weights are inputs, and whose operators say nothing of the machine."""
    exported = plain.exported
    for module in _graph_modules(exported):
        for node in module.graph.nodes:
            node.meta = {key: value for key, value in node.meta.items() if key in _KEPT}
    old = exported.graph_signature
    lifted = [str(spec.target) for spec in old.input_specs if spec.kind != InputKind.USER_INPUT]
    held = {**exported.state_dict, **exported.constants}
    specs = [InputSpec(InputKind.USER_INPUT, spec.arg, None) for spec in old.input_specs]
    # sizes that come of values inside, such as a nonzero's, are not among the inputs, and torch reads no file without their range
    ranges = dynamic_sizes([node.meta.get("val") for node in exported.graph.nodes])[1]
    program = exported_program(exported.graph_module, ExportGraphSignature(specs, old.output_specs), ranges, {}, {})
    return TorchGraph(plain.kind, program, {name: held[name] for name in lifted})


def save(graph: TorchGraph, path: Path) -> TorchGraph:
    """Write a program, and return it as it is read back.

    Raises:
        ExportError: torch does not write it.
    """
    try:
        with tracing():
            torch.export.save(graph.exported, path)
            return dataclasses.replace(graph, exported=torch.export.load(path))
    except Exception as error:  # the serializer's errors have no common class
        raise ExportError(f"torch.export cannot save the {graph.kind} graph: {type(error).__name__}: {first_line(error)}") from error


def compile_package(graph: TorchGraph, path: Path) -> list[str]:
    """Compile a program that was read back with AOTInductor into a package; return what the compiler assumed of the dynamic sizes.

    Raises:
        ExportError: It does not compile.
    """
    values = tuple(node.meta["val"] for node in graph.exported.graph.find_nodes(op="placeholder"))
    env, ranges = dynamic_sizes(list(values))
    try:
        with tracing(), torch.no_grad():
            module: Any = graph.exported.module(check_guards=False)
            torch_compat.compile_package(module, values, path)
    except Exception as error:  # the compiler's errors have no common class
        raise ExportError(f"AOTInductor cannot compile the {graph.kind} graph: {type(error).__name__}: {first_line(error)}") from error
    assumed = [guard.expr for guard in env.guards] if env else []
    return [print_expression(expression) for expression in assumed if expression.free_symbols <= set(ranges)]
