"""How the tests of the passes get a program to a certain point, and run it there."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

from bwcache_compile.config import CacheConfig
from bwcache_compile.ir.compare import flat_outputs
from bwcache_compile.ir.graph_text import format_graph
from bwcache_compile.ir.plan import CachePlan
from bwcache_compile.ir.program import ModelProgram, PassResult
from bwcache_compile.passes import CACHE_PIPELINE, canonicalize, find_blocks, plan_cache, run_pipeline
from tests.models import Exposed, Functional, InPlace, Interleaved, OneStream, Refined, Tiny, TwoStream, captured

DENSE = CacheConfig(num_steps=4, indicator_tokens="all")
SPARSE = CacheConfig(num_steps=4, indicator_tokens=3)
WAYS = ("output", "residual", "taylor")
MASK = (0, 1, 0, 1, 1)
POLICY = {"threshold": 0.15, "interval": 1, "tail_numerator": 1, "tail_denominator": 2, "warmup": 0, "num_steps": 4}


def planned(model: Tiny, config: CacheConfig = DENSE) -> ModelProgram:
    """Capture a model and take it through the analyses."""
    program = canonicalize(captured(model)).program
    return program.replace(plan=plan_cache(program, find_blocks(program), config))


def ready_for(transform: Callable[[ModelProgram], PassResult], model: Tiny, config: CacheConfig = DENSE) -> ModelProgram:
    """Run the pipeline up to a pass, without it."""
    return run_pipeline(planned(model, config), CACHE_PIPELINE[: CACHE_PIPELINE.index(transform)])


def applied(transform: Callable[[ModelProgram], PassResult], program: ModelProgram) -> ModelProgram:
    """Run one pass, and every check that belongs to it."""
    return run_pipeline(program, (transform,))


def text(program: ModelProgram, depth: int = 8) -> str:
    """Print the graph of a computed step."""
    return format_graph(program.compute, depth)


def around(transform: Callable[[ModelProgram], PassResult], program: ModelProgram, depth: int = 8) -> tuple[str, str]:
    """Run one pass; return the graph of a computed step as text, before and after it."""
    before = text(program, depth)
    return before, text(applied(transform, program), depth)


def folded(message: str) -> str:
    """Break a message into lines that fit beside the code."""
    return "\n".join(textwrap.fill(line, 120, break_on_hyphens=False) for line in message.splitlines())


def fresh(plan: CachePlan) -> dict[str, Tensor]:
    """Return the state before the first step."""
    return {slot.name: torch.full(slot.shape, slot.fill, dtype=slot.dtype) for slot in plan.slots}


def fill_buffers(program: ModelProgram) -> None:
    """Give the buffers that stand for the slots a fresh state's data, so that a program before lifting can run."""
    holder = program.compute.get_submodule("bwcache_cache")
    for name, tensor in fresh(program.planned()).items():
        if hasattr(holder, name):
            setattr(holder, name, tensor)


def policy_values(**changes: float) -> list[Tensor]:
    """Return the schedule's inputs in order."""
    return [torch.tensor([value], dtype=torch.float32 if name == "threshold" else None) for name, value in {**POLICY, **changes}.items()]


def policy_inputs(program: ModelProgram, **changes: float) -> list[Tensor]:
    """Return the policy's inputs in order: the schedule's, or a mask."""
    steps = program.planned().settings.mask_steps
    return [torch.tensor(MASK[:steps])] if steps else policy_values(**changes)


def way_inputs(program: ModelProgram) -> list[Tensor]:
    """Return what a reused step takes of the settings, in order."""
    settings = program.planned().settings
    mask = MASK[: settings.mask_steps] or None
    config = CacheConfig(reuse=settings.reuse, policy="static" if mask else "schedule", steps_mask=mask)
    values = settings.way.values(config) if settings.way.values else {}
    return [torch.tensor(values[p.name], dtype=getattr(torch, p.dtype)) for p in settings.way.parameters]


def run(program: ModelProgram, *args: Tensor, step: int = 0) -> list[Tensor]:
    """Run the graph as far as it is built, and return everything that it returns; the state is fresh."""
    slots = [fresh(program.planned())[name] for name in program.compute_slots]
    inputs = [*(arg.clone() for arg in args), *slots, *policy_values(), torch.tensor([step])]
    count = len(program.compute.graph.find_nodes(op="placeholder"))
    if count == len(args) + len(slots) + 1:  # the step alone
        inputs = [*inputs[: count - 1], inputs[-1]]
    return list(program.compute(*inputs[:count]))


def compute(program: ModelProgram, args: tuple[Tensor, ...], state: dict[str, Tensor], step: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Run a lifted graph on a state; return the user's outputs with the policy's behind them, and the next state."""
    slots = [state[name].clone() for name in program.compute_slots]
    returned = list(program.compute(*(arg.clone() for arg in args), *slots, *policy_inputs(program), torch.tensor([step])))
    count, names = program.signature.out_spec.num_leaves, [slot.name for slot in program.planned().slots]
    kept = [value.clone() for value in returned[count : count + len(names)]]
    return returned[:count] + returned[count + len(names) :], dict(zip(names, kept, strict=True))


def reuse(program: ModelProgram, args: tuple[Tensor, ...], state: dict[str, Tensor], step: int) -> list[Tensor]:
    """Run the graph of a reused step on a state, and check that it leaves the state alone."""
    slots = [state[name].clone() for name in program.reuse_slots]
    outputs = list(program.reuse(*(arg.clone() for arg in args), *slots, *way_inputs(program), torch.tensor([step])))
    for value in outputs:
        value.mul_(0.5).mul_(2)  # a caller may write to what it was given
    assert same(slots, [state[name] for name in program.reuse_slots])
    return outputs


def eager(model: Tiny, *args: Tensor) -> list[Tensor]:
    """Run the model itself."""
    return flat_outputs(model(*(arg.clone() for arg in args)))


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Whether two runs returned the same bits; NaN equals NaN."""

    def equal(a: Tensor, b: Tensor) -> bool:
        return torch.equal(a.isnan(), b.isnan()) and torch.equal(a[~a.isnan()], b[~b.isnan()])

    return len(left) == len(right) and all(equal(a, b) for a, b in zip(left, right, strict=True))


def models() -> st.SearchStrategy[Tiny]:
    """Draw a model that can be cached, of any kind and of any small size."""
    depth, width = st.integers(2, 4), st.sampled_from((4, 8, 12))
    return st.one_of(
        st.builds(OneStream, depth, width),
        st.builds(InPlace, depth, width),
        st.builds(Exposed, depth, width),
        st.builds(Functional, st.integers(3, 4), width),
        st.builds(TwoStream, depth, depth, width),
        st.builds(Refined, depth, depth, width),
        st.builds(Interleaved, depth, width),
    )
