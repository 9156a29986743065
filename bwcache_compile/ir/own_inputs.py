"""The inputs that passes add to a graph: the step, and what the graphs take of the settings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Graph, Node

from bwcache_compile.ir.edit import ROLE, fake, fake_mode, new_input, size_values
from bwcache_compile.ir.program import ModelProgram
from bwcache_compile.policies import Parameter
from bwcache_compile.size_expressions import evaluate


def _graph_input(graph: Graph, role: str, value: Tensor) -> Node:
    """Return our input of this role, and add it after the others if there is none; `step` stays the last input."""
    inputs = graph.find_nodes(op="placeholder")
    for node in inputs:
        if node.meta.get(ROLE) == role:
            return node
    last = inputs[-1]
    with graph.inserting_before(last) if last.meta.get(ROLE) == "step" else graph.inserting_after(last):
        node = new_input(graph, role, value)
    node.meta[ROLE] = role
    return node


def own_value(program: ModelProgram, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Describe a value of ours that has this shape for one decision; with `batch_reduce="per_sample"`, those of all samples joined."""
    plan = program.planned()
    if plan.settings.batch_reduce != "per_sample":
        return fake(shape, dtype, plan.device)
    assert plan.samples is not None
    count = evaluate(plan.samples, size_values(program))
    return fake((shape[0] * count, *shape[1:]), dtype, plan.device, fake_mode(program.compute.graph))


def parameter_inputs(program: ModelProgram, graph: Graph, parameters: Sequence[Parameter]) -> dict[str, Node]:
    """Return a graph's inputs for some of the settings, by their names; those that are not there are added."""
    shape = program.planned().settings.shape
    return {p.name: _graph_input(graph, f"policy_{p.name}", own_value(program, shape(p), getattr(torch, p.dtype))) for p in parameters}


def step_input(program: ModelProgram) -> Node:
    """Return the input that holds the step, int64[1]; with `batch_reduce="per_sample"`, that of each sample."""
    return _graph_input(program.compute.graph, "step", own_value(program, (1,), torch.int64))
