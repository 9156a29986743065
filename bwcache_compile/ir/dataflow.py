"""Compute which nodes of a graph depend on which, including dependencies through in-place operators.

`x.copy_(y)` changes what every later reader of `x`, or of a view of it, sees. Plain FX edges do not say so; the edges
here do. Node sets are bit masks over the order of the graph, so that reachability over thousands of nodes stays cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch.fx import Graph, GraphModule, Node

from bwcache_compile.ir.torch_compat import OpOverload

# They may return their input itself, and their schema does not say so.
_SILENT_ALIASES = frozenset({
    "aten::type_as", "aten::dropout", "aten::feature_dropout", "aten::alpha_dropout", "_c10d_functional::wait_tensor"
})  # fmt: skip

T = TypeVar("T", bound=Hashable)


def reachable(start: Iterable[T], needs: Callable[[T], Iterable[T]]) -> set[T]:
    """Return everything that some values need, directly or through others, and these values."""
    found: set[T] = set()
    waiting = list(start)
    while waiting:
        value = waiting.pop()
        if value not in found:
            found.add(value)
            waiting += needs(value)
    return found


def aliased_arguments(node: Node) -> tuple[list[Node], list[Node]]:
    """Return the arguments whose storage the result may share, and those that the node writes to."""
    if node.op != "call_function":
        return [], []
    if not isinstance(node.target, OpOverload):
        return ([node.args[0]] if getattr(node.target, "__name__", "") == "getitem" else []), []  # type: ignore[list-item]
    schema = node.target._schema
    silent = schema.name in _SILENT_ALIASES
    returned: set[str] = set()
    for result in schema.returns:
        if result.alias_info is not None:
            returned |= result.alias_info.before_set
    shared, written = [], []
    for position, argument in enumerate(schema.arguments):
        value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        nodes = (
            [value] if isinstance(value, Node) else [v for v in value if isinstance(v, Node)] if isinstance(value, (list, tuple)) else []
        )
        info = argument.alias_info
        if info is not None and info.is_write:
            written += nodes
        # "*" is how a schema says that the parts of a returned list share this argument's storage
        if (info is not None and (info.before_set & returned or "*" in info.after_set)) or (silent and position == 0):
            shared += nodes
    return shared, written


class DataFlow:
    """Reachability over a graph as it stands; build a new one after an edit.

    Attributes:
        nodes: The graph's nodes in order; bit `i` of a mask stands for `nodes[i]`.
        roots: For each node, the nodes whose storage its value may share (itself, where the storage is its own).
        ancestors: For each node, the mask of what must run before it, itself included.
    """

    def __init__(self, graph: Graph) -> None:
        """Read the graph once, in order."""
        self.nodes = list(graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.roots: dict[Node, frozenset[Node]] = {}
        self.writers: dict[Node, list[Node]] = {}
        self.ancestors: dict[Node, int] = {}
        self._needs: dict[Node, list[Node]] = {}
        readers: dict[Node, list[Node]] = {}
        for node in self.nodes:
            shared, written = aliased_arguments(node)
            self.roots[node] = frozenset().union(*(self.roots[s] for s in shared)) if shared else frozenset({node})
            touched = self.touched(node)
            needs = [*node.all_input_nodes, *(w for root in touched for w in self.writers.get(root, ()))]
            before = list(needs)
            for root in frozenset().union(*(self.roots[w] for w in written)) if written else ():
                before += readers.get(root, ())
                self.writers.setdefault(root, []).append(node)
            for root in touched:
                readers.setdefault(root, []).append(node)
            self._needs[node] = needs
            mask = 1 << self.index[node]
            for other in before:
                mask |= self.ancestors[other]
            self.ancestors[node] = mask
        self._descendants: dict[Node, int] | None = None

    def mask(self, nodes: Iterable[Node]) -> int:
        """Return the mask of some nodes."""
        mask = 0
        for node in nodes:
            mask |= 1 << self.index[node]
        return mask

    def select(self, mask: int) -> list[Node]:
        """Return the nodes of a mask, in order."""
        return [node for i, node in enumerate(self.nodes) if mask >> i & 1]

    def before(self, mask: int) -> int:
        """Return everything that must run before any node of the mask, the mask included."""
        result = 0
        for node in self.select(mask):
            result |= self.ancestors[node]
        return result

    def after(self, mask: int) -> int:
        """Return everything that must run after any node of the mask, the mask included."""
        return sum(1 << i for i, node in enumerate(self.nodes) if self.ancestors[node] & mask)

    def touched(self, node: Node) -> frozenset[Node]:
        """Return the roots of the storage that a node reads or writes."""
        return frozenset().union(*(self.roots[a] for a in node.all_input_nodes))

    def readers(self) -> dict[Node, list[Node]]:
        """Return, for each node, who needs its value or what it writes."""
        readers: dict[Node, list[Node]] = {node: [] for node in self.nodes}
        for node, needs in self._needs.items():
            for other in needs:
                readers[other].append(node)
        return readers

    def live(self, outputs: Iterable[Node], instead: Mapping[Node, Sequence[Node]] | None = None) -> set[Node]:
        """Return the nodes that the outputs depend on, including writes to values that these nodes read.

        Args:
            outputs: Where to begin.
            instead: Nodes that need these values instead of their operands.
        """
        return reachable(outputs, lambda node: (instead or {}).get(node, self._needs[node]))

    def outside_writers(self) -> list[Node]:
        """Return the nodes that change something the caller can see: an input, a parameter or a buffer."""
        return [w for root, writers in self.writers.items() if root.op in ("placeholder", "get_attr") for w in writers]


def _calls(node: Node) -> list[str]:
    """Return the module calls that a node ran in, outermost first; a second call of a module is another one."""
    return [str(key) for key in node.meta.get("nn_module_stack") or {}]


def _is_private(writer: Node, root: Node) -> bool:
    """Whether a module of a numbered stack (`blocks.0`) writes to memory that it allocated itself."""
    if writer.target is torch.ops.aten.detach_.default:  # stands behind each tensor made of numbers, and changes none
        return True
    calls = _calls(writer)
    if not calls or calls[-1] not in _calls(root):
        return False
    path = str(next(reversed(writer.meta["nn_module_stack"].values()))[0])
    return any(part.isdigit() for part in path.split("."))


def writes_escape(module: GraphModule) -> bool:
    """Whether a graph, or one nested in it, writes in place to memory that the writing block did not allocate.

    Such a write changes what another block reads, and no edge of the graph shows it: a hidden state that blocks edit in
    place seems to keep its value from before the first block. The functional form of the graph shows every value.
    """
    flow = DataFlow(module.graph)
    if any(not _is_private(writer, root) for root, writers in flow.writers.items() for writer in writers):
        return True
    for nested in module.children():
        if isinstance(nested, GraphModule):
            inner = DataFlow(nested.graph)
            returned = frozenset().union(*(inner.roots[node] for node in nested.graph.output_node().all_input_nodes))
            if inner.outside_writers() or any(root.op == "placeholder" for root in returned) or writes_escape(nested):
                return True
    return False


def eliminate_dead_code(graph: Graph) -> bool:
    """Erase every node that no output needs, and say whether there was one. Inputs stay."""
    flow = DataFlow(graph)
    live = flow.live([graph.output_node(), *flow.outside_writers()])
    dead = [node for node in flow.nodes if node not in live and node.op != "placeholder"]
    for node in reversed(dead):
        graph.erase_node(node)
    return bool(dead)
