"""Find the operators at which an exported graph begins to differ from torch, by making their results outputs of the graph."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from bwcache_compile.bundle.files import Bundle
from bwcache_compile.bundle.runners.ort import OrtRunner
from bwcache_compile.errors import first_line
from bwcache_compile.exporters.graphs import module_path, under_autocast
from bwcache_compile.exporters.onnx.repro import write_operator
from bwcache_compile.ir.compare import relative_error
from bwcache_compile.ir.graph_text import format_value, op_name
from bwcache_compile.ir.inline import inline_calls
from bwcache_compile.ir.program import ModelProgram
from bwcache_compile.ir.sizes import hint_shape
from bwcache_compile.ir.torch_compat import pytree

ROWS = 8
"""Operators that a table lists."""

_BYTES = 2**30
"""What the results may take that are compared in one run; where all take more, some are, and those that lead to the first that differs."""

_CANCELLED = 0.01
"""Share of the size of its operands that a result counts as having at least: what is left of a difference of equals is rounding."""

_PROBE = "probe.onnx"


@dataclasses.dataclass(frozen=True)
class Differing:
    """An operator whose result differs.

    Attributes:
        node: The node of the program.
        onnx: The operator of the file that makes the result.
        error: The largest difference, relative to the largest value.
        inherited: Whether something that it depends on differs already.
    """

    node: Node
    onnx: str
    error: float
    inherited: bool

    @property
    def name(self) -> str:
        """What it is in torch, with the node's name."""
        return f"{op_name(self.node)} ({self.node.name})"


def _largest(value: Tensor) -> float:
    """Return the largest absolute value that is finite."""
    size = value.abs() if value.is_complex() else value.double().abs()
    return float(torch.nan_to_num(size, posinf=0).max())


def _bytes(node: Node) -> int:
    """Return what a node's result takes at the captured sizes."""
    value = node.meta.get("val")
    return math.prod(hint_shape(value)) * value.dtype.itemsize if isinstance(value, Tensor) else 0


class _Recorder(Interpreter):
    """Runs a graph and keeps a copy of some results, as they are when they were computed, with the size that each has at least."""

    def __init__(self, module: GraphModule, wanted: set[str]) -> None:
        super().__init__(module)
        self._wanted = wanted
        self._sizes: dict[str, float] = {}
        self.found: dict[str, tuple[Tensor, float]] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        operands = max((self._sizes.get(operand.name, 0.0) for operand in n.all_input_nodes), default=0.0)
        values = [value for value in pytree.tree_leaves(result) if isinstance(value, Tensor) and value.numel()]
        own = max(map(_largest, values), default=0.0)
        self._sizes[n.name] = max(own, _CANCELLED * operands)
        if n.name in self._wanted and isinstance(result, Tensor):
            self.found[n.name] = result.detach().clone(), self._sizes[n.name]
        return result


@dataclasses.dataclass
class Comparison:
    """One graph of a bundle beside the program that it was written from.

    Attributes:
        program: What was exported.
        kind: "compute" or "reuse".
        bundle: Holds the graph, as the check runs it.
        origins: For each operator of the graph, the node of the program that it came from.
        values: The graph's inputs by name, as torch's tensors.
        to_session: Turns one of torch's tensors into what a session takes.
        options: Of the runtime.
        tolerance: Largest error that other kernels may make.
    """

    program: ModelProgram
    kind: str
    bundle: Bundle
    origins: Mapping[str, str]
    values: Mapping[str, Any]
    to_session: Callable[[Tensor], Any]
    options: Any
    tolerance: float

    def __post_init__(self) -> None:
        """Look up which value of the ONNX graph is the result of which node."""
        import onnx_ir as ir

        flat = inline_calls(getattr(self.program, self.kind))
        self.module = GraphModule(flat.attributes, flat.graph)
        self.nodes = {node.name: node for node in self.module.graph.nodes}
        self.results: dict[str, Any] = {}
        for node in ir.load(self.bundle.graph_file(self.kind)).graph:
            if str(node.name) in self.origins and len(node.outputs) == 1 and node.outputs[0].dtype != ir.DataType.BFLOAT16:
                self.results[self.origins[str(node.name)]] = node.outputs[0]  # of several, the last is the result
        self.results = {name: value for name, value in self.results.items() if name in self.nodes}
        largest = max((_bytes(self.nodes[name]) for name in self.results), default=1)
        self.probes = max(2, _BYTES // max(largest, 1))

    def torch_results(self, names: Sequence[str]) -> dict[str, tuple[Tensor, float]]:
        """Return what torch computes at some nodes, and the size that each counts as having at least."""
        recorder = _Recorder(self.module, set(names))
        inputs = [v.clone() if isinstance(v, Tensor) else v for v in self.program.io(self.kind).pack(self.values)]
        with torch.no_grad(), under_autocast(self.program):
            recorder.run(*inputs)
        return recorder.found

    def onnx_results(self, names: Sequence[str]) -> dict[str, Any]:
        """Return values of the ONNX graph by their names, as arrays.

        Raises:
            BundleError: The runtime does not run the graph with these as outputs.
        """
        import onnx_ir as ir

        manifest, entry = self.bundle.manifest, self.bundle.manifest.graphs[self.kind]
        model = ir.load(self.bundle.graph_file(self.kind))
        by_name = {str(value.name): value for node in model.graph for value in node.outputs}
        added = [name for name in names if name not in entry.outputs]
        model.graph.outputs.extend(by_name[name] for name in added)
        probe = dataclasses.replace(entry, file=_PROBE, outputs=(*entry.outputs, *added))
        path = self.bundle.folder / _PROBE
        try:
            ir.save(model, path)
            changed = dataclasses.replace(self.bundle, manifest=dataclasses.replace(manifest, graphs={**manifest.graphs, self.kind: probe}))
            runner = OrtRunner(changed, [self.kind], outputs="numpy", options=self.options)
            dtypes = {item.name: item.dtype for item in manifest.inputs}
            given = {name: self.to_session(self.values[name]) for name in entry.inputs}
            inputs = {name: runner.value(value, name, dtypes.get(name, str(value.dtype))) for name, value in given.items()}
            returned = runner.run(self.kind, inputs, {})
            return {name: returned[name].numpy() for name in names}
        finally:
            path.unlink(missing_ok=True)

    def errors(self, names: Sequence[str]) -> dict[str, float]:
        """Return how much results differ, by the node; nothing for those that have no like in the other graph."""
        wanted, found = self.torch_results(names), {}
        results = self.onnx_results([str(self.results[name].name) for name in names])
        for name, (want, size) in wanted.items():
            got = results[str(self.results[name].name)]
            if want.dtype in (torch.bfloat16, torch.float16) and str(got.dtype) == "float32":
                want = want.float()
            if tuple(got.shape) == tuple(want.shape) and str(got.dtype) == str(want.dtype).removeprefix("torch."):
                found[name] = relative_error(got, want, max(size, 1e-30))
        return found

    def _ancestors(self, names: Sequence[str]) -> set[str]:
        """Return the nodes that some nodes depend on, and these."""
        seen: set[str] = set()
        waiting = [self.nodes[name] for name in names]
        while waiting:
            node = waiting.pop()
            if node.name not in seen:
                seen.add(node.name)
                waiting += node.all_input_nodes
        return seen

    def first(self) -> list[Differing]:
        """Return the operators that differ first, in order; none if all agree.

        Raises:
            BundleError: The runtime does not run the graph with results as outputs.
        """
        every = [name for name in self.nodes if name in self.results]
        left = every
        while len(left) > self.probes:
            stride = math.ceil(len(left) / self.probes)
            marks = [left[min(place + stride, len(left)) - 1] for place in range(0, len(left), stride)]
            errors = self.errors(marks)
            apart = next((mark for mark in marks if errors.get(mark, 0) > self.tolerance), None)
            if apart is None:
                return []
            # what differs makes all differ that depends on it, comparisons aside
            agreeing = self._ancestors([mark for mark in marks[: marks.index(apart)] if mark in errors])
            above = self._ancestors([apart]) - agreeing
            left = [name for name in left if name in above]
        following = every[every.index(left[-1]) + 1 :] if left else []
        errors = self.errors([*left, *following][: self.probes])
        rows: list[Differing] = []
        tainted: set[Node] = set()
        for node in self.module.graph.nodes:
            inherited = not tainted.isdisjoint(node.all_input_nodes)
            error = errors.get(node.name, 0.0)
            if error > self.tolerance:
                rows.append(Differing(node, self.results[node.name].producer().name, error, inherited))
            if inherited or error > self.tolerance:
                tainted.add(node)
        return rows[:ROWS]


def write_repro(comparison: Comparison, row: Differing, folder: Path) -> str:
    """Write the operators of the file that came from one node, with their inputs and torch's result, and a script that compares.

    Returns:
        A sentence about what was written.

    Raises:
        OSError: The folder cannot be written to.
    """
    import onnx_ir as ir

    model = ir.load(comparison.bundle.graph_file(comparison.kind))
    nodes = [node for node in model.graph if comparison.origins.get(str(node.name)) == row.node.name]
    made = {value for node in nodes for value in node.outputs}
    read = [value for node in nodes for value in node.inputs if value is not None and value not in made and not value.is_initializer()]
    inputs = {str(value.name): value.is_graph_input() for value in read}
    computed = comparison.onnx_results([name for name, given in inputs.items() if not given])
    arrays = {name: comparison.to_session(comparison.values[name]) if given else computed[name] for name, given in inputs.items()}
    expected = comparison.to_session(comparison.torch_results([row.node.name])[row.node.name][0])
    title = f"{row.node.target} of {module_path(row.node) or 'the model'}, as {', '.join(str(node.op_type) for node in nodes)}"
    write_operator(folder, model, arrays, str(nodes[-1].outputs[0].name), expected, title)
    return f"{folder} holds the first of them, with its inputs: python {folder / 'repro.py'}"


def _table(rows: Sequence[Differing]) -> str:
    cells = [("module", "operator", "in the file", "result", "error", "")]
    for row in rows:
        result = format_value(row.node.meta["val"]) if "val" in row.node.meta else "?"
        source = "its inputs differ" if row.inherited else "its inputs agree"
        cells.append((module_path(row.node) or "-", row.name, row.onnx, result, f"{row.error:.3g}", source))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("    " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells)


def explain_difference(comparison: Comparison, repro: Path | None = None) -> str:
    """Return a table of the operators that differ first, when both graphs run on torch's inputs and torch's cache of the step.

    Args:
        comparison: The graph beside the program.
        repro: A folder to write the first of these operators to; see `write_repro`.
    """
    try:
        rows = comparison.first()
        written = f"\n  {write_repro(comparison, rows[0], repro)}" if rows and repro is not None else ""
    except Exception as error:  # whatever it is: that the numbers differ must not be hidden by it
        return f"\n  Its operators could not be compared: {first_line(error)}"
    if not rows:
        return (
            f"\n  On torch's inputs and cache of this step, no operator of the {comparison.kind} graph differs: the difference comes from"
            " an earlier step, or from operators that the runtime fuses."
        )
    head = f"\n  Operators of the {comparison.kind} graph that differ first, on torch's inputs and cache of this step:\n"
    return head + _table(rows) + written
