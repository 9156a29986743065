"""The data that passes hand to one another. Nodes are named, never held: a name survives every copy of a graph."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from bwcache_compile.config import GraphSettings
from bwcache_compile.graph_io import INDICATOR, REUSE_LEFT, STEP, GraphIO, cache_out, user_names
from bwcache_compile.ir.examples import Example
from bwcache_compile.ir.layout import Order, in_order
from bwcache_compile.ir.sizes import OpenSizes, Shape, Size, has_no_size
from bwcache_compile.ir.torch_compat import TreeSpec, pytree
from bwcache_compile.ir.tree_paths import leaf_paths, output_name
from bwcache_compile.ir.work_share import WorkShare
from bwcache_compile.policies import POLICIES, REUSES
from bwcache_compile.size_expressions import evaluated

OURS = "bwcache_"
"""Prefix of the names of graphs and buffers that passes add to a module, so that they never hide the model's own."""

REGION_MARK = "bwcache_region"
"""Key in the `meta` of every operator of the cached region. Names repeat from graph to graph; this mark does not."""


@dataclasses.dataclass(frozen=True)
class Block:
    """One repeated block: `nodes` in execution order, `live_outs` the floating values that others read.

    `feature` is the live-out that the indicator measures: the stream that reaches the model's output.
    """

    name: str
    stack: str
    module_type: str
    nodes: tuple[str, ...]
    live_outs: tuple[str, ...]
    feature: str = ""


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

    def __str__(self) -> str:
        """List the stacks with their counts, then the rejections."""
        lines = []
        for stack in dict.fromkeys(block.stack for block in self.blocks):
            members = [block for block in self.blocks if block.stack == stack]
            lines.append(f"{members[0].name} .. {members[-1].name}: {len(members)} x {members[0].module_type or 'modules'}")
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

    def fresh(self, sizes: Mapping[str, int], device: torch.device) -> Tensor:
        """Return the slot of a context that has computed nothing, where the program's symbols have these values."""
        return in_order(torch.full(evaluated(self.shape, sizes), self.fill, dtype=self.dtype, device=device), self.order)


@dataclasses.dataclass(frozen=True)
class Measured:
    """A feature that the indicator measures: block name, node, token slice (dimension 1) or None, sampling stride."""

    block: str
    node: str
    token_range: tuple[Size, Size] | None
    stride: int | None


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
    measured: tuple[Measured, ...]
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
        notes: What the user should know about this plan.
    """

    settings: GraphSettings
    blocks: tuple[Block, ...]
    regions: tuple[Region, ...]
    time_input: str | None
    hidden_bytes: int
    device: torch.device
    work: WorkShare
    notes: tuple[str, ...] = ()

    @property
    def measured(self) -> tuple[Measured, ...]:
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

    def __str__(self) -> str:
        """Say what is skipped and what it costs, before the first step."""
        settings, way = self.settings, REUSES[self.settings.reuse]
        mib = 2**20
        outputs = sum(slot.bytes for slot in self.slots if slot.role in way.slots)
        references = sum(slot.bytes for slot in self.slots if slot.role == "reference")
        lines = [
            f"{len(self.blocks)} blocks are skipped on a reused step: {self.blocks[0].name} .. {self.blocks[-1].name}",
            str(self.work),
            f"policy {settings.policy}, reuse {settings.reuse}, {len(self.measured)} blocks measured"
            + (f", one token in {settings.indicator_tokens}" if settings.indicator_tokens != "all" else ", every token"),
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


OPERAND = object()
"""Stands for the operand in the steps of a `Reading`."""


def _operand(tensor: Tensor, leaf: Any) -> Any:
    return tensor if leaf is OPERAND else leaf


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """What a model read in Python of an input that is too large to be built in: a few functions of it, such as `torch.all(x == 0)`.

    Attributes:
        source: The input's position among the leaves of the call.
        steps: Functions with their arguments, where `OPERAND` stands for what the step before returned.
        value: What the last one returned when the model was captured.
    """

    source: int
    steps: tuple[tuple[Callable[..., Any], Any, Any], ...]
    value: Tensor | None = None

    def apply(self, tensor: Tensor) -> Tensor:
        """Return what the steps make of a tensor."""
        for function, args, kwargs in self.steps:
            operand = functools.partial(_operand, tensor)
            tensor = function(*pytree.tree_map(operand, args), **pytree.tree_map(operand, kwargs))
        return tensor


@dataclasses.dataclass(frozen=True)
class Signature:
    """How a flat graph call corresponds to the model's call.

    `inputs` names the graph's user inputs in flat order; positions that hold a constant (None, bool, str, int) are inputs too,
    whose value the graph ignores. `sizes` says which sizes may change; None: none may. `read` holds the tensors whose values the
    model read in Python, by position among the inputs or by a buffer's name: the graph is right for these values alone.
    `readings` are such values of larger inputs. `read_at` is the first line that makes it so. `examples` holds what was kept of
    the inputs of the capture, by name: an export is checked with inputs like these. `autocast` lists the device types and dtypes
    of the autocast around the capture: the graph is right under the same one alone.
    """

    in_spec: TreeSpec
    out_spec: TreeSpec
    inputs: tuple[str, ...]
    sizes: OpenSizes | None = None
    read: Mapping[int | str, Tensor] = dataclasses.field(default_factory=dict)
    readings: tuple[Reading, ...] = ()
    read_at: str = ""
    examples: Mapping[str, Example] = dataclasses.field(default_factory=dict)
    autocast: tuple[tuple[str, torch.dtype], ...] = ()

    @property
    def captured_sizes(self) -> dict[str, int]:
        """The open sizes as they were when the model was captured, by symbol."""
        return {symbol.name: symbol.example for symbol in self.sizes.symbols} if self.sizes else {}

    @property
    def read_names(self) -> list[str]:
        """Names of the inputs and buffers whose values are built in."""
        return sorted({name if isinstance(name, str) else self.inputs[name] for name in (*self.read, *(r.source for r in self.readings))})

    @property
    def values(self) -> tuple[tuple[int, Hashable], ...]:
        """The values of a call that are built in, by position among the inputs."""
        found: dict[int, tuple[Any, ...]] = {}
        for i, value in [*self.read.items(), *((reading.source, reading.value) for reading in self.readings)]:
            if isinstance(i, int) and value is not None:
                found[i] = (*found.get(i, ()), *value.flatten().tolist())
        return tuple(found.items())


def graph_module_copy(module: GraphModule) -> GraphModule:
    """Copy a graph and those it calls; the parameters are shared."""
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    copy = GraphModule(module, graph)
    for node in graph.find_nodes(op="call_module"):
        called = module.get_submodule(str(node.target))
        if isinstance(called, GraphModule):
            copy.add_submodule(str(node.target), graph_module_copy(called))
    return copy


@dataclasses.dataclass(frozen=True)
class Captured:
    """A model's graph as it was captured, which no pass edits: flat inputs, a tuple of outputs, weights read by name.

    `attributes` maps those names to the model's own tensors (and to the graphs that higher-order operators run).
    """

    graph: Graph
    attributes: dict[str, Any]

    def module(self) -> GraphModule:
        """Return a graph of its own over the same weights."""
        graph = Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        return GraphModule(self.attributes, graph)


@dataclasses.dataclass(frozen=True)
class CachedProgram:
    """A captured model on its way to the cached form.

    `compute` is the whole model, edited in place by each pass; `reuse` exists after `specialize`. Neither holds
    weights of its own: both point at the model's. `plan` is there from planning on.
    After `lift_cache_state`, `io("compute")` says what `compute` takes and returns. `reuse` exists after `specialize`, `guarded`
    after `insert_cond`.
    """

    compute: GraphModule
    captured: Captured
    signature: Signature
    model_name: str
    plan: CachePlan | None = None
    reuse: GraphModule | None = None
    guarded: GraphModule | None = None
    compute_slots: tuple[str, ...] = ()
    reuse_slots: tuple[str, ...] = ()

    @property
    def has_unsized_values(self) -> bool:
        """Whether some value as captured has a size that depends on the values of a tensor."""
        values = (node.meta.get("val") for node in self.captured.graph.nodes)
        return any(isinstance(value, Tensor) and has_no_size(value) for value in values)

    def copy(self) -> CachedProgram:
        """Return a program with graphs of its own, so that passes on it leave this one alone; weights are shared."""
        return self.replace(compute=graph_module_copy(self.compute), reuse=self.reuse and graph_module_copy(self.reuse))

    def fresh(self) -> CachedProgram:
        """Return the program as it was captured, before any pass."""
        return CachedProgram(self.captured.module(), self.captured, self.signature, self.model_name)

    def replace(self, **changes: Any) -> CachedProgram:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def io(self, kind: str) -> GraphIO:
        """Return the names, in order, of what one of the finished graphs takes and returns."""
        plan = self.planned()
        slots = tuple(slot.name for slot in (plan.guard_slots if kind == "guarded" else plan.slots))
        read = {"compute": self.compute_slots, "reuse": self.reuse_slots, "guarded": slots}[kind]
        parameters = () if kind == "reuse" else tuple(parameter.name for parameter in POLICIES[plan.settings.policy].parameters)
        own = (STEP, REUSE_LEFT, INDICATOR)
        results = map(output_name, leaf_paths(self.signature.out_spec))
        taken = (*self.signature.inputs, *own, *(cache_out(slot.name) for slot in plan.slots))
        measures: tuple[str, ...] = ()
        if kind == "compute":
            found = ((f"{REUSE_LEFT}{r.tag}", *((f"{INDICATOR}{r.tag}",) if r.measured else ())) for r in plan.regions)
            measures = tuple(name for names in found for name in names)
        elif kind == "guarded" and plan.measured:
            measures = (INDICATOR,)
        return GraphIO(
            kind=kind,
            users=user_names(self.signature.inputs, own, ".in"),
            slots=read,
            parameters=parameters,
            results=user_names(results, taken, ".out"),
            written=() if kind == "reuse" else slots,
            measures=measures,
        )

    def planned(self) -> CachePlan:
        """Return the plan of a program that is past planning."""
        assert self.plan is not None, "this pass runs after plan_cache"
        return self.plan


@dataclasses.dataclass(frozen=True)
class PassResult:
    """What a pass returns: the program afterwards, and whether anything changed."""

    program: CachedProgram
    modified: bool
