"""Decide what is cached and what it takes. An analysis: the graph is not edited."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx import Node

from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import ConfigError, NoBlocksFoundError, UnsupportedGraphError
from bwcache_compile.ir.dataflow import DataFlow
from bwcache_compile.ir.edit import is_early
from bwcache_compile.ir.graph_text import format_value
from bwcache_compile.ir.plan import Block, BlockSearch, CachePlan, IndicatorProbe, Region
from bwcache_compile.ir.program import ModelProgram
from bwcache_compile.ir.ranks import Ranks
from bwcache_compile.ir.samples import check_samples, sample_count
from bwcache_compile.ir.sizes import has_no_size, hint, hint_shape, shape_of, size_of
from bwcache_compile.ir.source_lines import node_line
from bwcache_compile.passes._arrangement import arrangement
from bwcache_compile.passes._slots import region_slots
from bwcache_compile.passes._work import module_of, work_share
from bwcache_compile.passes.block_search.streams import continued, leaves_the_stream, merged_skip, path_ends
from bwcache_compile.policies import POLICIES
from bwcache_compile.policies.sampling import measured_blocks

_DECISIONS = {
    "joint": "one decision for a whole batch: its samples are measured together, and compute and reuse the same steps",
    "max": "one decision for a whole batch: its samples compute and reuse the same steps, as the one that changes most needs it",
    "per_sample": "each sample of a batch has its own schedule",
}
_NEAREST = 5
"""How many rejected candidates an error names."""


def _cached_blocks(program: ModelProgram, search: BlockSearch, config: CacheConfig) -> tuple[Block, ...]:
    if not search.blocks:
        nearest = sorted(search.rejections, key=lambda r: (-r.count, -len(r.nodes)))[:_NEAREST]
        evidence = "".join(f"\n    {r.stack} ({r.count} module{'s' * (r.count > 1)}): {r.reason}." for r in nearest)
        evidence = f"\n  Nearest candidates, each rejected:{evidence}" if nearest else "\n  No modules and no operators repeat."
        raise NoBlocksFoundError(
            f"no repeated transformer blocks in {program.model_name}.{evidence}\n"
            "  A stack is cached if its modules have the same class or run the same operators, and each one takes the output of the"
            " one before it, with the same number of tokens.\n  Pass `blocks=[...]` with the paths of yours, or run"
            " `bwcache_compile.find_blocks(model, example_kwargs=...)` to see every candidate."
        )
    count, first, last = len(search.blocks), config.compute_first, config.compute_last
    if first + last >= count:
        raise ConfigError(
            f"compute_first={first} and compute_last={last} leave no block to cache: {program.model_name} has {count} blocks."
        )
    return search.blocks[first : count - last]


def _region(flow: DataFlow, blocks: tuple[Block, ...]) -> list[Node]:
    """Return all nodes that depend on a block and that a block depends on; a list of tensors takes its readers in too."""
    named = {node.name: node for node in flow.nodes}
    mask = flow.mask(named[name] for block in blocks for name in block.nodes)
    region = flow.before(mask) & flow.after(mask)
    while True:
        inside = flow.select(region)
        parts = [user for node in inside if not isinstance(node.meta.get("val"), Tensor) for user in node.users if user.op != "output"]
        grown = region | flow.mask(parts)
        if grown == region:
            return inside
        region = grown


def _whole(flow: DataFlow) -> list[Node]:
    """Return all operators on tensors; sizes that are worked out from the inputs stay in front of them."""
    return [node for node in flow.nodes if node.op == "call_function" and not is_early(node)]


def _check_writes(flow: DataFlow, region: list[Node], outputs: list[Node], program: ModelProgram) -> None:
    """Refuse writes that a reused step would skip, or that would reach one kept output and not another."""
    inside, late = set(region), flow.after(flow.mask(region))
    for root, writers in flow.writers.items():
        holders = [node for node in outputs if root in flow.roots[node]]
        for writer in writers:
            # the functional form of a graph writes to the caller's tensors at its end
            seen = root.op in ("placeholder", "get_attr") and bool(late >> flow.index[writer] & 1)
            if seen or (writer in inside and root not in inside):
                raise UnsupportedGraphError(
                    f"{program.model_name} cannot be cached: `{writer.name}` inside the blocks writes to `{root.name}` outside of them."
                    " A reused step would skip that write. Return the value instead."
                )
            if writer not in inside and late >> flow.index[writer] & 1 and holders and (len(holders) > 1 or root not in inside):
                raise UnsupportedGraphError(
                    f"{program.model_name} cannot be cached: `{writer.name}`, after the blocks, writes in place to memory that"
                    " the block outputs"
                    f" {' and '.join(f'`{node.name}`' for node in holders)} share with"
                    f" {'one another' if root in inside else f'`{root.name}` before them'}. Cached outputs share no memory."
                    " Write to a copy instead."
                )


def _check_sizes(values: Iterable[Node], program: ModelProgram) -> None:
    """Refuse to keep what has no size before the model runs."""
    for node in values:
        if has_no_size(node.meta["val"]):
            at = next((node_line(n) for n in program.captured.graph.nodes if n.meta.get("unbacked_bindings") and node_line(n)), "")
            raise UnsupportedGraphError(
                f"{program.model_name} cannot be cached: `{node.name}` {format_value(node.meta['val'])}, which the blocks return,"
                " has a size that depends on the values of a tensor (.item(), .tolist(), indexing by a mask)"
                + (f"\n    at {at}\n " if at else ".")
                + " Compute sizes from shapes instead, or pass the mask or the lengths as an input of at most two dimensions."
            )


def _time_input(program: ModelProgram) -> str | None:
    """Return the float32 input that is taken for the time: the only one of rank 0 or 1, or if there is none, the only column [B, 1].

    None where there are several. An input that is taken for the time and is not does not move, which the graphs see.
    """
    inputs = [node for node in program.compute.graph.find_nodes(op="placeholder") if isinstance(node.meta.get("val"), Tensor)]
    columns = [node for node in inputs if node.meta["val"].dim() == 2 and hint(node.meta["val"].shape[1]) == 1]
    found = [node for node in inputs if node.meta["val"].dim() <= 1] or columns
    return found[0].name if len(found) == 1 and found[0].meta["val"].dtype == torch.float32 else None


def _entered(output: Node, blocks: tuple[Block, ...], nodes: dict[str, Node], inputs: list[Node], flow: DataFlow) -> list[Node]:
    """Return the inputs that the first block on an output's residual path continues; what is added on the way is none."""
    every = flow.mask(nodes[name] for block in blocks for name in block.nodes)
    for place, block in enumerate(blocks):
        streams = [nodes[name] for name in block.live_outs if nodes[name] is output or continued(output, {nodes[name]}, flow)]
        if streams:
            own = {nodes[name] for name in block.nodes}
            earlier = flow.mask(nodes[name] for other in blocks[:place] for name in other.nodes)
            if any(leaves_the_stream(stream, set(inputs), own, earlier, every, flow) for stream in streams):
                return []
            entered = {i for stream in streams for i in continued(stream, set(inputs), flow)}
            return [i for i in inputs if i in entered]
    return [i for i in inputs if i in continued(output, set(inputs), flow)]


def _ended(output: Node, members: list[Node], flow: DataFlow) -> str:
    """Say at which modules the residual path of an output ends, and between which values it cannot choose there."""
    ends = []
    for end in path_ends(output, set(members), flow)[-_NEAREST:]:
        module, merged = module_of(end), " and ".join(f"`{value.name}`" for value in merged_skip(end))
        ends.append(f"`{end.name}`{module and f' of {module}'}{merged and f', which merges {merged}, none computed from another'}")
    return f"\n  Followed back through sums and re-arrangements, its residual path ends at {' and at '.join(ends)}.\n " if ends else ""


def _sources(
    program: ModelProgram,
    flow: DataFlow,
    region: Region,
    nodes: dict[str, Node],
    blocks: tuple[Block, ...],
    config: CacheConfig,
) -> Region:
    """Prove what each region output continues: region inputs, as they are or as the region joins, cuts and permutes them."""
    inputs, members = [nodes[name] for name in region.inputs], [nodes[name] for name in region.nodes]
    sources: dict[str, str] = {}
    arrangements: dict[str, dict[str, str]] = {}
    advice = "" if config.granularity == "stack" else "granularity='stack' with "
    for output in (nodes[name] for name in region.outputs):
        entered = _entered(output, blocks, nodes, inputs, flow)
        proved = [a for a in [arrangement(flow, members, inputs, entered, output)] if a is not None]
        if not proved and len(entered) > 1:  # of two that are summed, one may be added again and again, as an embedding of places
            single = [arrangement(flow, members, inputs, [alone], output) for alone in entered]
            proved = [a for i, a in enumerate(single) if a is not None and a not in single[:i]]
        if len(proved) != 1:
            shapes = ", ".join(f"{i.name} {format_value(i.meta.get('val'))}" for i in inputs)
            raise ConfigError(
                f"reuse={config.reuse!r} does not fit {program.model_name}: it requires that each output of the blocks be an input of the"
                f" blocks plus a change, and for `{output.name}` {format_value(output.meta.get('val'))} no such input was found"
                f" (inputs: {shapes})."
                f"{_ended(output, members, flow)} Use {advice}reuse='output' or 'taylor'."
            )
        sources[output.name] = proved[0].node.name
        for node, operands in proved[0].copied.items():
            arrangements[node.name] = {operand.name: stand_in.name for operand, stand_in in operands.items()}
    return dataclasses.replace(region, sources=sources, arrangements=arrangements)


def _measured(
    blocks: tuple[Block, ...], search: BlockSearch, config: CacheConfig, nodes: dict[str, Node], ranks: Ranks | None
) -> tuple[IndicatorProbe, ...]:
    if not POLICIES[config.policy].measures:
        return ()
    chosen = [blocks[at] for at in measured_blocks(len(blocks), config.indicator_blocks)]
    shape = shape_of(nodes[search.blocks[-1].feature].meta["val"])
    stride = None if config.indicator_tokens == "all" else config.indicator_tokens
    return tuple(
        IndicatorProbe(b.name, b.feature, search.token_range if shape_of(nodes[b.feature].meta["val"]) == shape else None, stride, ranks)
        for b in chosen
    )


def _make_region(
    program: ModelProgram,
    flow: DataFlow,
    nodes: dict[str, Node],
    blocks: tuple[Block, ...],
    measured: tuple[IndicatorProbe, ...],
    config: CacheConfig,
    tag: str,
) -> Region:
    """Take in all that depends on one of the blocks and that one of them depends on, and check that it may be skipped."""
    members = _region(flow, blocks) if config.cut == "blocks" else _whole(flow)
    inside = set(members)
    inputs = list(dict.fromkeys(a for n in members for a in n.all_input_nodes if a not in inside and a.op != "get_attr"))
    outputs = [n for n in members if isinstance(n.meta.get("val"), Tensor) and any(u not in inside for u in n.users)]
    _check_sizes(outputs, program)
    _check_writes(flow, members, outputs, program)
    for node in outputs:
        if not config.graph_settings.way.any_dtype and not node.meta["val"].is_floating_point():
            raise ConfigError(
                f"reuse={config.reuse!r} requires floating-point outputs of the blocks; `{node.name}` is {format_value(node.meta['val'])}."
            )
    region = Region(
        tag=tag,
        nodes=tuple(n.name for n in members),
        inputs=tuple(n.name for n in inputs),
        outputs=tuple(n.name for n in outputs),
        sources={},
        measured=measured,
    )
    if config.graph_settings.way.needs_source:
        region = _sources(program, flow, region, nodes, blocks, config)
    return dataclasses.replace(region, slots=region_slots(program, config, region, nodes))


def _notes(
    program: ModelProgram, search: BlockSearch, measured: tuple[IndicatorProbe, ...], config: CacheConfig, time_input: str | None
) -> tuple[str, ...]:
    notes = []
    if program.signature.sizes is not None:
        captured = ", ".join(f"{name} = {value}" for name, value in program.signature.captured_sizes.items())
        notes.append(f"sizes are dynamic; bytes are given for {captured}")
        if config.graph_settings.way.needs_source:
            notes.append("which input each output of the blocks continues was verified at these sizes")
    if config.graph_settings.way.needs_time and time_input is None:
        notes.append(
            "no input is clearly the timestep (the only one of rank 0 or 1, or the only column, in float32), so steps are counted instead"
        )
    for m in measured[-1:]:
        if m.token_range is not None:
            notes.append(f"the indicator measures tokens {m.token_range[0]}:{m.token_range[1]}, those that the output takes")
    samples = sample_count(program)
    if measured and samples is not None and hint(samples) > 1:
        notes.append(_DECISIONS[config.batch_reduce])
    return tuple(notes)


def plan_cache(program: ModelProgram, search: BlockSearch, config: CacheConfig, ranks: Ranks | None = None) -> CachePlan:
    """Choose the regions, their inputs and outputs, what is measured, and every slot of the state.

    A region is all that depends on a block and that a block depends on; before it is the prologue, after it the
    epilogue. There is one, or with `granularity="block"` one per block. Of a stream that holds text and video rows, the
    indicator measures those that the epilogue takes, where that is proved. What `ranks` measure, they measure together.

    Raises:
        NoBlocksFoundError: The search found none.
        ConfigError: No block is left to cache, `reuse="residual"` cannot be proved right, or the samples of a batch decide where ranks do.
        UnsupportedGraphError: A block writes to something outside the blocks, or returns what has no size before it runs.
    """
    if ranks is not None and config.batch_reduce != "joint":
        raise ConfigError(
            f"ranks that decide together measure whole batches, got batch_reduce={config.batch_reduce!r}. Use batch_reduce='joint'."
        )
    blocks = _cached_blocks(program, search, config)
    flow = DataFlow(program.compute.graph)
    nodes = {node.name: node for node in flow.nodes}
    _check_sizes((nodes[block.feature] for block in blocks), program)
    measured = _measured(blocks, search, config, nodes, ranks)
    if config.granularity == "block":
        own = [tuple(m for m in measured if m.block == block.name) for block in blocks]
        each = enumerate(zip(blocks, own, strict=True))
        regions = tuple(_make_region(program, flow, nodes, (block,), m, config, str(i)) for i, (block, m) in each)
    else:
        regions = (_make_region(program, flow, nodes, blocks, measured, config, ""),)
    found = (
        regions[0].nodes
        if config.cut == "blocks" and len(regions) == 1 and blocks == search.blocks
        else [n.name for n in _region(flow, search.blocks)]
    )
    sources = {name: region.continued_inputs(name) for region in regions for name in region.outputs}
    time_input = _time_input(program) if config.graph_settings.way.needs_time else None
    feature = nodes[blocks[-1].feature].meta["val"]
    return CachePlan(
        settings=config.graph_settings,
        blocks=blocks,
        regions=regions,
        time_input=time_input,
        hidden_bytes=math.prod(hint_shape(feature)) * feature.dtype.itemsize,
        device=feature.device,
        samples=None if config.batch_reduce == "joint" else size_of(check_samples(program, (), config.batch_reduce)),
        work=work_share(program, flow, search, regions, [nodes[name] for name in found], sources),
        notes=_notes(program, search, measured, config, time_input),
    )
