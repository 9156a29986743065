"""Measure how far the blocks' features have moved since the last computed step."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from bwcache_compile.ir.edit import call_traced, check_results, inserted, new_input, read_slot, result, size_node, size_values, write_slot
from bwcache_compile.ir.graph_text import called_graph
from bwcache_compile.ir.own_inputs import own_value
from bwcache_compile.ir.plan import IndicatorProbe, Region
from bwcache_compile.ir.program import OURS, ModelProgram, PassResult
from bwcache_compile.ir.ranks import Ranks, check_group, mean_over_ranks
from bwcache_compile.ir.samples import each_sample
from bwcache_compile.ir.sizes import Size, size_of
from bwcache_compile.ir.torch_compat import OpOverload
from bwcache_compile.passes._slots import own_tokens
from bwcache_compile.policies import INDICATORS
from bwcache_compile.policies.sampling import sampled_tokens
from bwcache_compile.size_expressions import evaluate, largest

aten = torch.ops.aten


def _append(after: Node, target: OpOverload, args: tuple[Any, ...], name: str, **kwargs: Any) -> Node:
    graph = after.graph
    with graph.inserting_after(after):
        node = graph.create_node("call_function", target, (after, *args), kwargs, name=name)
    node.meta["val"] = target(after.meta["val"], *map_arg(args, lambda operand: operand.meta["val"]), **kwargs)
    return node


def _passed_in(program: ModelProgram, call: Node, size: Size) -> Node | int:
    """Return a size inside a region: an int stands for itself, a dynamic size becomes an input of the region."""
    outer = size_node(program, size)
    if isinstance(outer, int):
        return outer
    graph = called_graph(program.compute, call).graph
    inputs = graph.find_nodes(op="placeholder")
    if outer in call.args:
        return inputs[call.args.index(outer)]
    call.args = (*call.args, outer)
    with graph.inserting_after(inputs[-1]):
        return new_input(graph, outer.name, outer.meta["val"])


def _places(program: ModelProgram, call: Node, before: Node, shape: torch.Size, measured: IndicatorProbe, index: int) -> Node:
    """Say which rows of a feature are measured: a constant, or worked out in the graph where their number is open."""
    stride, device, inner = measured.stride, program.planned().device, called_graph(program.compute, call)
    assert stride is not None
    rows, own = _passed_in(program, call, size_of(before.meta["val"].shape[-2])), own_tokens(shape, measured, index)
    with inner.graph.inserting_before(before):
        if isinstance(rows, Node):
            node = call_traced(inner, f"tokens_{index}", lambda n: sampled_tokens(n, stride, index, device), [rows])
            # tracing a few tokens fixes what it records of the size, not the size
            node.meta["val"] = before.meta["val"].new_empty(largest(1, rows.meta["val"] // stride), dtype=torch.int64)
            return node
        places = (sampled_tokens(rows, stride, index) if own is None else own).to(device)
        inner.register_buffer(f"{OURS}tokens_{index}", places, persistent=False)
        node = inner.graph.get_attr(f"{OURS}tokens_{index}")
    node.meta["val"] = before.meta["val"].new_empty(len(places), dtype=torch.int64)  # of the graph's own fake mode
    return node


def _sample(program: ModelProgram, call: Node, node: Node, measured: IndicatorProbe, index: int) -> Node:
    """Take the measured rows of a feature, right where it is computed."""
    if measured.token_range is not None:
        bounds = [_passed_in(program, call, size) for size in measured.token_range]
        node = _append(node, aten.slice.Tensor, (1, *bounds), f"stream_{index}")
    value: Tensor = node.meta["val"]
    if measured.stride is None:
        return _append(node, aten.clone.default, (), f"sample_{index}", memory_format=torch.contiguous_format)
    shape = [math.prod(value.shape[:-1]), value.shape[-1]]
    samples = program.planned().samples
    if samples is not None:  # of each sample the places that are measured where it is alone
        count = evaluate(samples, size_values(program))
        shape = [count, shape[0] // count, shape[1]]
    sizes = [_passed_in(program, call, size_of(size)) for size in shape]
    node = _append(node, aten.reshape.default, (sizes,), f"rows_{index}")
    places = _places(program, call, node, value.shape, measured, index)
    return _append(node, aten.index_select.default, (len(shape) - 2, places), f"sample_{index}")


def _largest(changes: Tensor, count: int | SymInt) -> Tensor:
    """Return the changes of the sample whose indicator, their mean, is the largest, float32[blocks]; one that is not finite is."""
    each = changes.reshape(count, changes.shape[0] // count)
    mean = each.mean(1)
    worst = torch.where(mean == mean, mean, math.inf).argmax(0, keepdim=True)  # NaN is not equal to itself
    return each.index_select(0, worst).reshape(-1)


def _of_batch(each: Callable[..., tuple[Tensor, ...]], largest: bool, count: int | SymInt, *tensors: Tensor) -> Tensor:
    """Return the changes of each sample, float32[samples * blocks], or those of the sample that changes most."""
    (changes,) = each(count, *tensors)
    return _largest(changes, count) if largest else changes


def _check_groups(program: ModelProgram, region: GraphModule, ranks: Ranks) -> None:
    """Refuse blocks that communicate with ranks which would decide otherwise."""
    for node in region.graph.nodes:
        group = node.args[-1] if getattr(node.target, "namespace", "") == "_c10d_functional" else None
        if isinstance(group, str):
            check_group(program.model_name, node.name, group, ranks)


def _measure(program: ModelProgram, region: Region) -> None:
    plan, module, graph = program.planned(), program.compute, program.compute.graph
    call = inserted(graph, f"region{region.tag}")
    inner = called_graph(module, call)
    ranks, named = region.measured[0].ranks, {node.name: node for node in inner.graph.nodes}
    if ranks is not None:
        _check_groups(program, inner, ranks)
    samples = [_sample(program, call, named[m.node], m, plan.measured.index(m)) for m in region.measured]
    output = inner.graph.output_node()
    output.args = ((*output.args[0], *samples),)  # type: ignore[misc]
    inner.recompile()
    call.meta["val"] = (*call.meta["val"], *(s.meta["val"] for s in samples))
    anchor: Node = call
    features = []
    for i in range(len(samples)):
        with graph.inserting_after(anchor):
            anchor = result(call, len(region.outputs) + i, region.slot("feature", i))
        features.append(anchor)
    slots = [slot for i in range(len(samples)) for slot in plan.slots if slot.name == region.slot("reference", i)]
    references = [read_slot(program, slot) for slot in slots]

    def change(*tensors: Tensor) -> Tensor:
        before = tensors[len(slots) :]
        returned: Tensor = INDICATORS[plan.settings.indicator](tensors[: len(slots)], before)
        return returned if ranks is None else mean_over_ranks(returned, before, ranks)

    operands, name, function = [*features, *references], f"indicator={plan.settings.indicator!r}", change
    if plan.samples is not None:
        count = size_node(program, plan.samples)
        function = functools.partial(_of_batch, each_sample(change, name), plan.settings.batch_reduce == "max")
        if isinstance(count, int):
            function = functools.partial(function, count)
        else:
            operands = [count, *operands]
    with graph.inserting_before(graph.output_node()):
        made = call_traced(module, region.slot("indicator"), function, operands, region.slot("change"))
    check_results(name, [made], [own_value(program, (len(slots),), torch.float32)])
    for slot, feature in zip(slots, features, strict=True):
        write_slot(program, slot, feature)


def insert_indicator(program: ModelProgram) -> PassResult:
    """Make `change` what the indicator finds of each measured block, float32[blocks], against the reference slots.

    The region returns the measured rows behind its outputs; each becomes the next value of its reference slot. For a
    policy that measures nothing the graph stays as it is. With guards per block each has its own `change0` ... Ranks that
    run the model together get one `change`, by one reduction in the graph.

    Raises:
        ConfigError: The blocks communicate with ranks that would decide otherwise.
    """
    measuring = [region for region in program.planned().regions if region.measured]
    for region in measuring:
        _measure(program, region)
    return PassResult(program, bool(measuring))
