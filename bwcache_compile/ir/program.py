"""A model on its way from the captured graph to its cached form."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule

from bwcache_compile.graph_io import INDICATOR, REUSE_LEFT, STEP, GraphIO, cache_out, user_names
from bwcache_compile.ir.call_signature import Signature
from bwcache_compile.ir.plan import CachePlan
from bwcache_compile.ir.sizes import has_no_size, shape_of
from bwcache_compile.ir.tree_paths import leaf_paths, output_name
from bwcache_compile.policies import POLICIES

OURS = "bwcache_"
"""Prefix of the names of graphs and buffers that passes add to a module, so that they never hide the model's own."""

REGION_MARK = "bwcache_region"
"""Key in the `meta` of every operator of the cached region. Names repeat from graph to graph; this mark does not."""


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
class ModelProgram:
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

    def copy(self) -> ModelProgram:
        """Return a program with graphs of its own, so that passes on it leave this one alone; weights are shared."""
        return self.replace(compute=graph_module_copy(self.compute), reuse=self.reuse and graph_module_copy(self.reuse))

    def fresh(self) -> ModelProgram:
        """Return the program as it was captured, before any pass."""
        return ModelProgram(self.captured.module(), self.captured, self.signature, self.model_name)

    def replace(self, **changes: Any) -> ModelProgram:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def io(self, kind: str) -> GraphIO:
        """Return the names, in order, of what one of the finished graphs takes and returns."""
        plan = self.planned()
        slots = tuple(slot.name for slot in (plan.guard_slots if kind == "guarded" else plan.slots))
        read = {"compute": self.compute_slots, "reuse": self.reuse_slots, "guarded": slots}[kind]
        deciding, reusing = POLICIES[plan.settings.policy].parameters, plan.settings.way.parameters
        parameters = {"compute": deciding, "reuse": reusing, "guarded": (*deciding, *reusing)}[kind]
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
            parameters=tuple(parameter.name for parameter in parameters),
            results=user_names(results, taken, ".out"),
            written=() if kind == "reuse" else slots,
            measures=measures,
        )

    def value(self, name: str) -> dict[str, Any]:
        """Return name, shape and dtype of a value of the captured graph as plain data; null where a pass made the value.

        A dynamic size is text.
        """
        values = [node.meta.get("val") for node in self.captured.graph.nodes if node.name == name]
        if not values or not isinstance(values[0], Tensor):
            return {"name": name, "shape": None, "dtype": None}
        return {"name": name, "shape": list(shape_of(values[0])), "dtype": str(values[0].dtype).removeprefix("torch.")}

    def planned(self) -> CachePlan:
        """Return the plan of a program that is past planning."""
        assert self.plan is not None, "this pass runs after plan_cache"
        return self.plan


@dataclasses.dataclass(frozen=True)
class PassResult:
    """What a pass returns: the program afterwards, whether anything changed, and what it left as it was, by name, with the reason."""

    program: ModelProgram
    modified: bool
    left: Mapping[str, str] = dataclasses.field(default_factory=dict)
