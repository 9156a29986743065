"""Print and compare graphs, for tests, errors and users.

A line per operator, `name: dtype[shape] = op(operands)`; parameters stand in place under their own names; a graph
called by another, and each arm of a cond, is printed indented below the call.
"""

from __future__ import annotations

import dataclasses
import difflib
import operator
from collections import Counter
from typing import Any

import torch
from torch.fx import GraphModule, Node

from bwcache_compile.ir.torch_compat import HigherOrderOperator, OpOverload

_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f64", "int64": "i64", "int32": "i32", "bool": "b8"}


def format_value(value: Any) -> str:
    """Describe a tensor as `dtype[shape]`, a dynamic size as arithmetic; anything else by its type."""
    if isinstance(value, torch.Tensor):
        name = str(value.dtype).removeprefix("torch.")
        return f"{_DTYPES.get(name, name)}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(format_value(item) for item in value)})"
    if isinstance(value, torch.SymInt):
        return str(value)
    return type(value).__name__


def called_graph(module: GraphModule, node: Node) -> GraphModule:
    """Return the graph that a `call_module` node calls."""
    inner = module.get_submodule(str(node.target))
    assert isinstance(inner, GraphModule), f"{node.target} is no graph"
    return inner


def called_graphs(module: GraphModule, node: Node) -> list[tuple[str, GraphModule]]:
    """Return the graphs that a node runs, by name: the called one, the arms of a `cond`, a higher-order operator's body."""
    if node.op == "call_module":
        return [("", called_graph(module, node))]
    if node.op != "call_function" or not isinstance(node.target, HigherOrderOperator):
        return []
    found = []
    for operand in node.all_input_nodes:
        inner = operator.attrgetter(str(operand.target))(module) if operand.op == "get_attr" else None
        if isinstance(inner, GraphModule):
            found.append((str(operand.target).removeprefix("bwcache_"), inner))
    return found


def op_name(node: Node) -> str:
    """Name a node's operator briefly: `linear`, `add`, `call` for a graph."""
    if node.op == "call_module":
        return "call"
    if isinstance(node.target, OpOverload):
        return node.target._opname
    return getattr(node.target, "__name__", str(node.target))


def _format_argument(argument: Any) -> str:
    if isinstance(argument, Node):
        return str(argument.target).removeprefix("bwcache_") if argument.op == "get_attr" else argument.name
    if isinstance(argument, (list, tuple)):
        return f"[{', '.join(map(_format_argument, argument))}]"
    return str(argument)


def format_node(node: Node) -> str:
    """Print one node on one line."""
    arguments = [_format_argument(a) for a in node.args] + [f"{k}={_format_argument(v)}" for k, v in node.kwargs.items()]
    if node.op == "output":
        return f"return {', '.join(_format_argument(a) for a in node.all_input_nodes)}"
    if node.op == "call_module":
        arguments.insert(0, str(node.target).removeprefix("bwcache_"))
    value = node.meta.get("val")
    shown = f": {format_value(value)}" if value is not None else ""
    if node.op == "placeholder":
        return f"{node.name}{shown} = input"
    return f"{node.name}{shown} = {op_name(node)}({', '.join(arguments)})"


def format_graph(module: GraphModule, depth: int = 8) -> str:
    """Print a graph and, down to `depth`, the graphs that it calls."""
    lines: list[str] = []
    for node in module.graph.nodes:
        if node.op == "get_attr":
            continue
        lines.append(format_node(node))
        for name, inner in called_graphs(module, node) if depth > 0 else ():
            lines += [f"  {name}:"] if name else []
            lines += ["  " + line for line in format_graph(inner, depth - 1).splitlines()]
    return "\n".join(lines)


def diff_graphs(before: str, after: str, name: str = "") -> str:
    """Return the lines that differ between two printed graphs, `-` before and `+` after; empty if there are none."""
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm=""))[2:]
    kept = [line for line in lines if not line.startswith("@@")]
    return "\n".join([f"@@ {name}", *kept]) if kept else ""


def op_counts(module: GraphModule) -> Counter[str]:
    """Count operators by name, over the graph and every graph it calls."""
    counts: Counter[str] = Counter()
    for node in module.graph.nodes:
        if node.op == "call_function":
            counts[op_name(node)] += 1
        for _, inner in called_graphs(module, node):
            counts += op_counts(inner)
    return counts


@dataclasses.dataclass(frozen=True)
class GraphSnapshot:
    """A graph as it was at one moment: printed, counted, and the parameters it read, by identity."""

    text: str
    ops: Counter[str]
    parameters: frozenset[int]


def snapshot(module: GraphModule) -> GraphSnapshot:
    """Record a graph, so that it can be compared after it was edited."""
    return GraphSnapshot(format_graph(module), op_counts(module), frozenset(id(p) for p in module.parameters()))


@dataclasses.dataclass(frozen=True)
class GraphDiff:
    """How a graph changed, as text and as counts.

    Attributes:
        text: The differing lines.
        added: Operators that are new, by name.
        removed: Operators that are gone, by name.
        shared_parameters: Parameters that both graphs read, by identity.
        copied_parameters: Parameters of the new graph that the old one does not hold.
        blocks_guarded: Blocks that a reused step skips, where the new graph is a cached one.
        before: The whole graph as it was, printed.
        after: The whole graph as it is, printed.
    """

    text: str
    added: dict[str, int]
    removed: dict[str, int]
    shared_parameters: int
    copied_parameters: int
    blocks_guarded: int = 0
    before: str = dataclasses.field(default="", repr=False)
    after: str = dataclasses.field(default="", repr=False)

    def __str__(self) -> str:
        """Print the text and a line of counts."""
        changes = [f"+{n} {op}" for op, n in self.added.items()] + [f"-{n} {op}" for op, n in self.removed.items()]
        counts = (
            f"{', '.join(changes) or 'no operator changed'}; {self.shared_parameters} parameters shared, {self.copied_parameters} copied"
        )
        return f"{self.text}\n{counts}; {self.blocks_guarded} blocks guarded"


def graph_diff(before: GraphModule | GraphSnapshot, after: GraphModule | GraphSnapshot, name: str = "", blocks: int = 0) -> GraphDiff:
    """Compare two graphs, or what was recorded of them."""
    old = snapshot(before) if isinstance(before, GraphModule) else before
    new = snapshot(after) if isinstance(after, GraphModule) else after
    shared = len(old.parameters & new.parameters)
    return GraphDiff(
        text=diff_graphs(old.text, new.text, name),
        added=dict(new.ops - old.ops),
        removed=dict(old.ops - new.ops),
        shared_parameters=shared,
        copied_parameters=len(new.parameters) - shared,
        blocks_guarded=blocks,
        before=old.text,
        after=new.text,
    )
