"""Count multiply-adds, and tell which of them a reused step runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from bwcache_compile.ir.dataflow import DataFlow
from bwcache_compile.ir.graph_text import called_graphs, op_name
from bwcache_compile.ir.plan import BlockSearch, Region
from bwcache_compile.ir.program import ModelProgram
from bwcache_compile.ir.torch_compat import HigherOrderOperator
from bwcache_compile.ir.work_share import Uncached, WorkShare
from bwcache_compile.passes.block_search.stacks import user_path


def _sizes(value: Any) -> list[int]:
    """Return a tensor's sizes at capture; one that only the tensors' values tell counts as 1."""
    return [size if isinstance(size, int) else size.node.hint or 1 for size in value.shape] if isinstance(value, Tensor) else []


def _operands(node: Node) -> list[list[int]]:
    """Return the sizes of a node's tensor operands in order, those in a list among them."""
    return [_sizes(a.meta["val"]) for a in node.all_input_nodes if isinstance(a.meta.get("val"), Tensor)]


def _product(left: int) -> Callable[[Node], int]:
    """Count a product whose left factor is the operand `left`."""
    return lambda node: math.prod(_sizes(node.meta["val"])) * _operands(node)[min(left, len(_operands(node)) - 1)][-1]


def _convolution(node: Node) -> int:
    return math.prod(_sizes(node.meta["val"])) * math.prod(_operands(node)[1][1:])


def _einsum(node: Node) -> int:
    shapes = _operands(node)
    letters = str(node.args[0]).replace(" ", "").partition("->")[0].split(",")
    if "." in "".join(letters) or len(letters) != len(shapes):
        return math.prod(_sizes(node.meta["val"])) * shapes[0][-1]
    return math.prod(
        {letter: size for term, shape in zip(letters, shapes, strict=True) for letter, size in zip(term, shape, strict=True)}.values()
    )


def _attention(node: Node) -> int:
    """Count queries times keys and weights times values."""
    query, key, value = _operands(node)[:3]
    return math.prod(query) * key[-2] + math.prod(query[:-1]) * key[-2] * value[-1]


def _encoder_layer(node: Node) -> int:
    """Count torch's fused encoder layer: its weights once a token, and the attention over the tokens."""
    tokens, *weights = _operands(node)
    return math.prod(tokens[:-1]) * (sum(math.prod(w) for w in weights if len(w) == 2) + 2 * tokens[-2] * tokens[-1])


_COUNTS: dict[str, Callable[[Node], int]] = {
    **dict.fromkeys(("linear", "matmul", "mm", "bmm", "_int_mm", "_scaled_mm"), _product(0)),
    **dict.fromkeys(("addmm", "baddbmm"), _product(1)),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    **dict.fromkeys(("_transformer_encoder_layer_fwd", "_native_multi_head_attention"), _encoder_layer),
    "einsum": _einsum,
}


def multiply_adds(node: Node, module: GraphModule) -> int:
    """Count the multiply-adds of a matrix product, a convolution or an attention at the captured sizes; 0 for all else."""
    if node.op != "call_function":
        return 0
    name = op_name(node)
    if name in _COUNTS:
        return _COUNTS[name](node)
    if "attention" in name and "backward" not in name:
        return _attention(node) if len(_operands(node)) > 2 else 0
    if isinstance(node.target, HigherOrderOperator):
        return sum(multiply_adds(inner, graph) for _, graph in called_graphs(module, node) for inner in graph.graph.nodes)
    return 0


def module_of(node: Node, depth: int | None = None) -> str:
    """Return the path of the module that a node ran in, or its first `depth` names."""
    paths = [user_path(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values() if path]
    return ".".join(paths[-1].split(".")[:depth]) if paths else ""


def _by_module(work: Mapping[Node, int]) -> Counter[str]:
    """Sum work by module, at the first depth that tells several apart."""
    grouped: Counter[str] = Counter()
    for depth in range(1, 5):
        grouped = Counter()
        for node, count in work.items():
            grouped[module_of(node, depth)] += count
        if len(grouped) > 1:
            break
    return grouped


def _reused(flow: DataFlow, regions: Sequence[Region], sources: Mapping[str, Iterable[str]]) -> set[Node]:
    """Return what a step runs on which every region reuses."""
    named = {node.name: node for node in flow.nodes}
    instead = {named[name]: [named[source] for source in sources.get(name, ())] for region in regions for name in region.outputs}
    alive = flow.live([flow.nodes[-1], *flow.outside_writers()], instead)
    return alive.difference(named[name] for region in regions for name in region.nodes)


def work_share(
    program: ModelProgram,
    flow: DataFlow,
    search: BlockSearch,
    regions: Sequence[Region],
    found: Iterable[Node],
    sources: Mapping[str, Iterable[str]],
) -> WorkShare:
    """Return how much of the model's work a reused step skips, and which parts of the model it still runs.

    Args:
        program: Before it is rewritten.
        flow: Of its graph.
        search: Where the blocks and the rejected stacks come from.
        regions: What is cached.
        found: All nodes between the blocks that were found, also where fewer are cached.
        sources: With `reuse="residual"`: the region inputs that each output is put together from.
    """
    work = {node: multiply_adds(node, program.compute) for node in flow.nodes}
    total = sum(work.values()) or 1
    alive, between = _reused(flow, regions, sources), set(found)
    cached = {name for region in regions for name in region.nodes}

    def share(nodes: Iterable[Node]) -> float:
        return sum(work[node] for node in nodes) / total

    outside = {node: work[node] for node in alive - between if work[node]}
    parts: list[Uncached] = []
    listed: set[Node] = set()
    for rejection in search.rejections:
        own = {node for node in flow.nodes if node.name in rejection.nodes} - listed
        if any(node.name not in cached for node in own) or not rejection.nodes:
            parts.append(Uncached(rejection.stack, rejection.count, share(own), share(own & set(outside)), rejection.reason))
        listed |= own
    rest = _by_module({node: count for node, count in outside.items() if node not in listed})
    reason = "it is not a stack of repeated blocks"
    parts += [Uncached(name, 0, count / total, count / total, reason) for name, count in rest.most_common()]
    return WorkShare(1 - share(alive), share(outside), tuple(parts), search.chosen)
