"""Make blocks that are alike calls of one graph, so that a compiler generates their code once."""

from __future__ import annotations

import logging
import operator
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch.fx import Graph, GraphModule, Node

from bwcache_compile.errors import warn
from bwcache_compile.ir.dataflow import DataFlow
from bwcache_compile.ir.edit import call_graph, result
from bwcache_compile.ir.graph_text import called_graphs
from bwcache_compile.ir.outlined_block import BLOCK, OutlinedBlock
from bwcache_compile.ir.program import REGION_MARK, ModelProgram, PassResult
from bwcache_compile.passes._alike import (
    Candidate,
    Memory,
    candidate_of,
    entangled,
    read_outside,
    repeated_views,
    shares_memory,
    shares_outputs,
    source,
    without_last_views,
)

LOGGER = logging.getLogger(__name__)

aten = torch.ops.aten


def _shared(alike: Sequence[Candidate], outputs: Sequence[int]) -> OutlinedBlock:
    """Return the graph that stands for blocks that are alike; their weights are inputs."""
    first, graph = alike[0], Graph()
    copies: dict[Hashable, Node] = {}
    for node in first.operands:
        copies[source(node)] = graph.placeholder(node.name)
        copies[source(node)].meta = dict(node.meta)
    for node in first.nodes:
        copies[node] = graph.node_copy(node, lambda other: copies[source(other)])
    graph.output(tuple(copies[first.nodes[i]] for i in outputs))
    return OutlinedBlock({}, graph, "Block")


def _gather(candidate: Candidate) -> None:
    """Move what stands between a block's operators away: behind them where it depends on one, else before them."""
    own, first, last = set(candidate.nodes), candidate.nodes[0], candidate.nodes[-1]
    between, node = [], first
    while node is not last:
        between += [] if node in own else [node]
        node = node.next
    for node in [node for node in between if node.op == "get_attr"]:
        first.prepend(node)
    between = [node for node in between if node.op != "get_attr"]
    if not between:
        return
    flow = DataFlow(first.graph)
    late = set(flow.select(flow.after(flow.mask(candidate.nodes)))).intersection(between)
    for node in between:
        if node not in late:
            first.prepend(node)
    for node in reversed([node for node in between if node in late]):
        last.append(node)


class _Edit:
    """Replaces blocks of one graph by calls.

    Attributes:
        flow: The graph before the first edit.
    """

    def __init__(self, module: GraphModule, flow: Memory, regional: bool) -> None:
        """Edit nothing yet."""
        self._module, self.flow, self._regional = module, flow, regional
        self._now: dict[Node, Node] = {}
        self._copies: dict[Node, Node] = {}

    def _operands(self, candidate: Candidate) -> list[Node]:
        """Return a block's operands as they are now; a region of a compiled graph takes no two views of one tensor, but copies."""
        views = [] if self._regional else repeated_views(candidate, self.flow)
        for node in views:
            if node not in self._copies:
                now = self._now.get(node, node)
                with self._module.graph.inserting_after(now):
                    copy = self._copies[node] = self._module.graph.call_function(aten.clone.default, (now,))
                copy.meta["val"] = aten.clone.default(node.meta["val"])
        return [self._copies[node] if node in views else self._now.get(node, node) for node in candidate.operands]

    def call(self, candidate: Candidate, inner: OutlinedBlock, name: str, outputs: Sequence[int]) -> None:
        """Replace a block's operators by a call of a graph that returns what they compute at the positions `outputs`."""
        operands = self._operands(candidate)
        _gather(candidate)
        graph, own = self._module.graph, set(candidate.nodes)
        with graph.inserting_after(candidate.nodes[-1]):
            call = call_graph(self._module, name, inner, operands)
        call.meta[BLOCK] = candidate.name
        anchor: Node = call
        for i, place in enumerate(outputs):
            node = candidate.nodes[place]
            with graph.inserting_after(anchor):
                anchor = self._now[node] = result(call, i, node.name)
            node.replace_all_uses_with(anchor, delete_user_cb=lambda user: user not in own)
        for node in reversed(candidate.nodes):
            graph.erase_node(node)


def _calls(module: GraphModule, flow: Memory) -> Iterator[tuple[GraphModule, Memory]]:
    """Yield a graph and those that it calls, each with its data flow."""
    yield module, flow
    for node in module.graph.find_nodes(op="call_module"):
        for _, inner in called_graphs(module, node):
            yield from _calls(inner, Memory(inner.graph, [flow.memory(a) for a in node.args if isinstance(a, Node)]))


def _outline(module: GraphModule, flow: Memory, blocks: dict[str, frozenset[str]], regional: bool) -> tuple[set[str], dict[str, str]]:
    """Outline the blocks of one graph; return which are calls now, and why others are not."""
    graph = module.graph
    owner = {name: block for block, names in blocks.items() for name in names}
    members: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.meta.get(REGION_MARK) and node.name in owner:  # names repeat from graph to graph
            members.setdefault(owner[node.name], []).append(node)
    least = 1 if regional else 2
    if len(members) < least:
        return set(), {}
    attributes = {str(n.target): operator.attrgetter(str(n.target))(module) for n in graph.find_nodes(op="get_attr")}
    classes: dict[Hashable, list[Candidate]] = {}
    for name, nodes in members.items():
        if not regional and shares_outputs(nodes, read_outside(nodes), flow):
            nodes = without_last_views(nodes, flow)
        candidate = candidate_of(name, nodes, attributes)
        classes.setdefault(candidate.key, []).append(candidate)
    refused = dict[str, str]()
    kinds: list[tuple[list[Candidate], list[int], OutlinedBlock]] = []
    for alike in classes.values():
        outputs = sorted({i for candidate in alike for i in read_outside(candidate.nodes)})
        objections = {candidate.name: entangled(candidate, flow, attributes) for candidate in alike}
        if not regional:
            objections = {c.name: objections[c.name] or shares_memory(c, outputs, flow, attributes) for c in alike}
        refused |= {name: reason for name, reason in objections.items() if reason is not None}
        fit = [candidate for candidate in alike if objections[candidate.name] is None]
        if len(fit) < least:
            refused |= {candidate.name: "no other block is like it" for candidate in fit}
        else:
            kinds.append((fit, outputs, _shared(fit, outputs)))
    edit = _Edit(module, flow, regional)  # once every shared graph is made: an edit replaces the operands of what follows
    for position, (fit, outputs, inner) in enumerate(kinds):
        for candidate in fit:
            edit.call(candidate, inner, f"block{position}", outputs)
    done = {candidate.name for fit, _, _ in kinds for candidate in fit}
    if done:
        for node in [node for node in graph.find_nodes(op="get_attr") if not node.users]:
            graph.erase_node(node)
        module.recompile()
    return done, refused


def outline_blocks(program: ModelProgram, regional: bool = False) -> PassResult:
    """Make the blocks of the compute graph that are alike calls of one graph, which takes their weights as operands.

    Two blocks are alike if they run the same operators with the same constants, on operands of the same shapes, strides and dtypes.
    Blocks of several kinds share a graph each. A block that is like no other, or that writes to or returns what is not its own, stays as
    it is; the log says which and why. What is around the blocks stays too: the rows that an indicator measures are taken outside of the
    call. The numbers do not change: the same operators run, in an order that respects every write.

    For compilers only: `torch.compile` generates the code of each such graph once, and AOTInductor compiles one package of each. The
    graph of a reused step, and one with the guard inside, stay as they are. The result's `left` has the blocks that are no calls.

    Args:
        program: Edited in place.
        regional: Outline for calls that are compiled for themselves, outside of any compiled graph. A block that is like no other is
            outlined too, and blocks may share memory with what is around them. What cannot be outlined is warned of: it runs eagerly.
    """
    blocks = {block.name: frozenset(block.nodes) for block in program.planned().blocks}
    done, refused = set[str](), dict[str, str]()
    for module, flow in list(_calls(program.compute, Memory(program.compute.graph, ()))):
        found, reasons = _outline(module, flow, blocks, regional)
        done, refused = done | found, refused | reasons
    program.compute.recompile()
    refused |= dict.fromkeys(blocks.keys() - done - refused.keys(), "its operators stand in no graph of their own")
    for name, reason in refused.items():
        if regional:
            warn(f"{name} of {program.model_name} is not compiled, since {reason}. It runs eagerly; compile() compiles it.")
        else:
            LOGGER.info("%s of %s is compiled for itself: %s", name, program.model_name, reason)
    LOGGER.info("%d of %d blocks of %s are compiled as calls of the graphs that they share", len(done), len(blocks), program.model_name)
    return PassResult(program, bool(done), refused)
