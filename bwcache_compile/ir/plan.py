"""What block search and planning hand on: blocks, regions, slots. Nodes are named, never held: a name survives every copy of a graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bwcache_compile.graph_settings import GraphSettings
from bwcache_compile.ir.layout import Order, in_order
from bwcache_compile.ir.ranks import Ranks
from bwcache_compile.ir.sizes import Shape, Size
from bwcache_compile.ir.work_share import WorkShare
from bwcache_compile.size_expressions import evaluated


@dataclasses.dataclass(frozen=True)
class Block:
    """One repeated block: `nodes` in execution order, `live_outs` the floating values that others read.

    `name` is the path of the module that is called. Of a list of modules that are called one after the other, which is never called
    itself, it has theirs: `layers.0.0+layers.0.1`.
    `feature` is the live-out that the indicator measures: the stream that reaches the model's output.
    """

    name: str
    stack: str
    module_type: str
    nodes: tuple[str, ...]
    live_outs: tuple[str, ...]
    feature: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the block as plain data; its operators are counted, not listed."""
        return {**vars(self), "nodes": len(self.nodes), "live_outs": list(self.live_outs)}


@dataclasses.dataclass(frozen=True)
class Rejection:
    """A candidate stack that is not cached, and why. `nodes` are its operators."""

    stack: str
    count: int
    reason: str
    nodes: frozenset[str] = dataclasses.field(default=frozenset(), repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class BlockSearch:
    """Blocks of the main stacks in execution order, and every candidate that was turned down.

    `token_range` is the slice (dimension 1) of the last feature that the epilogue takes, where that is proved. `chosen` says
    that the user named the blocks.
    """

    blocks: tuple[Block, ...]
    rejections: tuple[Rejection, ...]
    token_range: tuple[Size, Size] | None = None
    chosen: bool = False

    @property
    def stacks(self) -> dict[str, tuple[Block, ...]]:
        """The blocks of each stack, by the stack's name, in the order of their first blocks."""
        names = dict.fromkeys(block.stack for block in self.blocks)
        return {name: tuple(block for block in self.blocks if block.stack == name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Return blocks, stacks and rejections as plain data."""
        stacks = [
            {"name": name, "count": len(blocks), "module_type": blocks[0].module_type, "first": blocks[0].name, "last": blocks[-1].name}
            for name, blocks in self.stacks.items()
        ]
        rejections = [{"stack": r.stack, "count": r.count, "reason": r.reason} for r in self.rejections]
        return {"blocks": [block.to_dict() for block in self.blocks], "stacks": stacks, "rejections": rejections}

    def __str__(self) -> str:
        """List the stacks with their counts, then the rejections."""
        lines = [
            f"{members[0].name} .. {members[-1].name}: {len(members)} x {members[0].module_type or 'modules'}"
            for members in self.stacks.values()
        ]
        lines += [f"not cached: {r.stack} ({r.count} modules): {r.reason}" for r in self.rejections]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class CacheSlot:
    """One tensor of the cache state. A fresh state holds `fill` everywhere.

    `role` is "reference" for what the indicator compares with, "until" for the guard's own slot, else the name that the policy
    or the way of reusing has for it.
    `shape` is arithmetic over the program's symbols where sizes are open; `example` is the shape when the model was captured.
    `order` is how it lies in memory.
    """

    name: str
    role: str
    shape: Shape
    dtype: torch.dtype
    example: tuple[int, ...]
    order: Order
    fill: float = 0

    @property
    def bytes(self) -> int:
        """Size of the slot's tensor at the captured sizes."""
        return torch.Size(self.example).numel() * self.dtype.itemsize

    def to_dict(self) -> dict[str, Any]:
        """Return name, role, shape, dtype and bytes as plain data; a dynamic size is text."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"name": self.name, "role": self.role, "shape": list(self.shape), "dtype": dtype, "bytes": self.bytes}

    def fresh(self, sizes: Mapping[str, int], device: torch.device) -> Tensor:
        """Return the slot of a context that has computed nothing, where the program's symbols have these values."""
        return in_order(torch.full(evaluated(self.shape, sizes), self.fill, dtype=self.dtype, device=device), self.order)


@dataclasses.dataclass(frozen=True)
class IndicatorProbe:
    """A feature that the indicator measures: block name, node, token slice (dimension 1) or None, sampling stride.

    `ranks` measure it together; None for one process.
    """

    block: str
    node: str
    token_range: tuple[Size, Size] | None
    stride: int | None
    ranks: Ranks | None = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass(frozen=True)
class Region:
    """What one guard covers: the whole stack, or one block.

    Attributes:
        tag: Empty for the stack; the block's position for a block. It ends the names of what belongs to the region.
        nodes: Names of all nodes between the first block's inputs and the last block's outputs.
        inputs: Values that the region reads, parameters left out.
        outputs: Values that others read.
        sources: For `reuse="residual"`: what each region output continues: a region input, or a node of `arrangements`.
        measured: Features that the indicator measures; empty for `policy="static"`.
        slots: What is kept for this region.
        arrangements: Nodes of the region that only join, cut and permute, in order, each with what stands for its operands when
            it is copied to stand before the region: region inputs, or others of these nodes.
    """

    tag: str
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sources: dict[str, str]
    measured: tuple[IndicatorProbe, ...]
    slots: tuple[CacheSlot, ...] = ()
    arrangements: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)

    def continued_inputs(self, output: str) -> tuple[str, ...]:
        """Return the region inputs that an output's source is put together from; none without `reuse="residual"`."""
        found = [self.sources[output]] if output in self.sources else []
        for name in found:
            found += [other for other in self.arrangements.get(name, {}).values() if other not in found]
        return tuple(name for name in found if name in self.inputs)

    def slot(self, kind: str, index: int | None = None) -> str:
        """Name a slot of this region: `output_0`, or `output3_0` for the block at position 3."""
        return f"{kind}{self.tag}" + ("" if index is None else f"_{index}")


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """What is cached, how much it takes, and what could not be proved.

    Attributes:
        settings: The settings that shaped the graphs.
        blocks: The blocks that a reused step skips, in execution order.
        regions: What is guarded, in execution order: one region, or one per block with `granularity="block"`.
        time_input: For a way of reusing that needs it: the input that gives the time; None counts steps.
        hidden_bytes: Bytes of one hidden state: the last block's feature.
        device: Where the features are, and the state with them.
        work: How much of the model's work a reused step skips, and what is not cached.
        samples: Samples of a batch, where the graphs tell them apart; None where they do not.
        notes: What the user should know about this plan.
    """

    settings: GraphSettings
    blocks: tuple[Block, ...]
    regions: tuple[Region, ...]
    time_input: str | None
    hidden_bytes: int
    device: torch.device
    work: WorkShare
    samples: Size | None = None
    notes: tuple[str, ...] = ()

    @property
    def measured(self) -> tuple[IndicatorProbe, ...]:
        """Features that the indicator measures, over all regions; empty for `policy="static"`."""
        return tuple(measured for region in self.regions for measured in region.measured)

    @property
    def slots(self) -> tuple[CacheSlot, ...]:
        """Every tensor of one context's state, region by region."""
        return tuple(slot for region in self.regions for slot in region.slots)

    @property
    def guard_slots(self) -> tuple[CacheSlot, ...]:
        """Every tensor of one context's state for the guarded graph: per region, the last step that reuses comes on top."""
        return (
            *self.slots,
            *(CacheSlot(region.slot("reuse_until"), "until", (1,), torch.int64, (1,), (0,), fill=-1) for region in self.regions),
        )

    @property
    def state_bytes(self) -> int:
        """Bytes of one context's state."""
        return sum(slot.bytes for slot in self.slots)

    @property
    def hidden_states(self) -> float:
        """Size of one context's state in hidden states."""
        return self.state_bytes / self.hidden_bytes

    @property
    def transient_bytes(self) -> int:
        """Bytes of one context's state at its peak: while a computed step replaces every slot, old and new both live."""
        return 2 * self.state_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return what is cached and what it takes as plain data; of each region, its operators are counted."""
        regions = [
            {
                "tag": region.tag,
                "nodes": len(region.nodes),
                "live_ins": list(region.inputs),
                "live_outs": list(region.outputs),
                "measured": [probe.block for probe in region.measured],
                "slots": [slot.to_dict() for slot in region.slots],
            }
            for region in self.regions
        ]
        return {
            "settings": dataclasses.asdict(self.settings),
            "blocks": [block.name for block in self.blocks],
            "regions": regions,
            "time_input": self.time_input,
            "hidden_bytes": self.hidden_bytes,
            "state_bytes": self.state_bytes,
            "transient_bytes": self.transient_bytes,
            "hidden_states": self.hidden_states,
            "samples": self.samples,
            "work": self.work.to_dict(),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        """Say what is skipped and what it costs, before the first step."""
        settings, way = self.settings, self.settings.way
        mib = 2**20
        outputs = sum(slot.bytes for slot in self.slots if slot.role in way.slots)
        references = sum(slot.bytes for slot in self.slots if slot.role == "reference")
        lines = [
            f"{len(self.blocks)} blocks are skipped on a reused step: {self.blocks[0].name} .. {self.blocks[-1].name}"
            + (", and all else of the model" if settings.cut == "output" else ""),
            str(self.work),
            f"policy {settings.policy}, reuse {settings.reuse}"
            + (f" from {settings.anchors} computed steps" if settings.anchors > 1 else "")
            + f", {len(self.measured)} blocks measured"
            + (f", one token in {settings.indicator_tokens}" if settings.indicator_tokens != "all" else ", every token")
            + (", with one reduction over the ranks" if any(probe.ranks for probe in self.measured) else ""),
            f"state per context: {self.state_bytes / mib:.2f} MiB = {self.hidden_states:.2f} hidden states"
            f" ({outputs / mib:.2f} MiB outputs, {references / mib:.2f} MiB indicator);"
            f" {self.transient_bytes / mib:.2f} MiB while a step computes",
        ]
        if way.needs_time:
            time = self.time_input
            lines.append(
                f"extrapolates along {f'{time}, or along the step index while {time} does not move' if time else 'the step index'}"
            )
        lines += map(str, self.work.stacks)
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
