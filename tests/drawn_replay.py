"""An oracle for cuts that no item of a drawn model ends at: the captured graph with the region's outputs replaced.

Where blocks have no names, a repetition may begin and end inside what the drawn model calls an item. Which values are
replaced is then taken from the plan; that they are replaced, and by what, is worked out here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from bwcache_compile.ir.plan import Region
from bwcache_compile.ir.program import ModelProgram
from tests.drawn_cases import Case


def extrapolated(now: float, kept: list[tuple[float, Tensor]]) -> Tensor:
    """Return the line through the last two kept values at `now`; a new tensor, the last value where they give no line."""
    (before, previous), (at, last) = kept[-2:] if len(kept) > 1 else 2 * kept
    if at == before:
        return last.clone()
    weight = torch.tensor((now - at) / (at - before), dtype=torch.float32)
    return (last.float() + weight * (last.float() - previous.float())).to(last.dtype)


class Replay(Interpreter):
    """Runs every operator of a captured graph, step after step; on a reused step a region's outputs are what was kept."""

    def __init__(self, module: GraphModule, region: Region, case: Case) -> None:
        super().__init__(module)
        self.region, self.case = region, case
        self.step, self.now = 0, 0.0
        self.sources: dict[str, Tensor] = {}
        self.kept: list[tuple[float, dict[str, Tensor]]] = []

    def step_with(self, inputs: dict[str, Tensor]) -> list[Any]:
        self.now = float(inputs["t"][0]) if self.case.spec.time == "float32" else float(self.step)
        if not self.case.reused[self.step]:
            self.kept.append((self.now, {}))
        outputs: list[Any] = self.run(*(inputs[name] for name in sorted(inputs)))
        self.step += 1
        return outputs

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self.region.inputs and isinstance(value, Tensor):
            self.sources[n.name] = value.clone()
        if n.name in self.region.arrangements:
            stand_ins = self.region.arrangements[n.name]
            operands = {a: self.sources.get(stand_ins[a.name], self.env.get(a)) for a in n.all_input_nodes}
            args, kwargs = map_arg((n.args, n.kwargs), operands.__getitem__)
            self.sources[n.name] = n.target(*args, **kwargs)
        if n.name not in self.region.outputs:
            return value
        source = self.sources[self.region.sources[n.name]] if self.region.sources else 0
        if self.case.reused[self.step]:
            return self._held(n.name) + source
        self.kept[-1][1][n.name] = value - source if self.region.sources else value.clone()
        return value

    def _held(self, name: str) -> Tensor:
        kept = [(at, values[name]) for at, values in self.kept[-2:]]
        return extrapolated(self.now, kept) if self.case.reuse == "taylor" else kept[-1][1].clone()


def replayed(captured: ModelProgram, region: Region, case: Case, inputs: list[dict[str, Tensor]]) -> list[Any]:
    """Return the outputs of each step."""
    replay = Replay(captured.captured.module(), region, case)
    spec = captured.signature.out_spec
    with torch.no_grad():
        outputs = [replay.step_with({name: value.clone() for name, value in given.items()}) for given in inputs]
        return [pytree.tree_unflatten([leaf.clone() for leaf in leaves], spec) for leaves in outputs]
