"""Which architectures are drawn, and how they are cached."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import strategies as st

from tests.drawn import Spec
from tests.drawn_blocks import Short, Stack

STEPS = 5


@dataclasses.dataclass(frozen=True, repr=False)
class Case(Short):
    """An architecture, and how it is cached: reuse is forced after the step `trigger`, `interval` steps at a time."""

    spec: Spec
    reuse: str = "output"
    trigger: int = 1
    interval: int = 1
    compute_first: int = 0
    compute_last: int = 0

    @property
    def reused(self) -> list[bool]:
        """Whether each step of a forced run reuses."""
        return [s > self.trigger and (s - self.trigger) % (self.interval + 1) != 0 for s in range(STEPS)]


@st.composite
def stacks(draw: st.DrawFn, functional: bool, streams: int, depths: list[int], writes: bool) -> Stack:
    # a plain function's blocks are told by three equal repetitions, so their ends are drawn alike and no skip tells them apart
    kinds = ["single", "single", "double", "joint", "spacetime"] if streams > 1 else ["single", "single", "spacetime"]
    in_place = ["iadd", "rows", "copy", "scratch"] if writes else []
    return Stack(
        kind=draw(st.sampled_from(kinds)),
        depth=draw(st.sampled_from(depths)),
        mixer=draw(st.sampled_from(["mean", "softmax", "sdpa"])),
        residual=draw(st.sampled_from(["sum", "sum", "sum", "sum", "post", "none", *in_place])),
        norm=draw(st.sampled_from(["layer", "layer", "rms", "float", "none", "autocast"])),
        modulation=draw(st.sampled_from(["none", "scale", "scale", "adaln", "adaln", "table", "table", *(["decay"] if writes else [])])),
        constant=draw(st.sampled_from(["none", "factor", "roll", "row"])),
        odd="none" if functional else draw(st.sampled_from(["none", "none", "first", "last"])),
        own=draw(st.sampled_from([False, False, True])),
        skip="none" if functional else draw(st.sampled_from(["none", "none", "add", "cat"])),
        # known gap: in a plain function, the addition before a block's first operator can be taken for a hint's
        hints=0 if functional else draw(st.sampled_from([0, 0, 0, 1, 2])),
        glue=draw(st.sampled_from(["none", "none", "scale", "norm", "linear"])),
        rotary=draw(st.sampled_from([False, False, False, False, True])),
        feed=draw(st.sampled_from([False, False, False, True])),
    )


# hypothesis mixes numbers of 100 and more that stand in the loaded sources into what it draws: cases would change with them
numbers = st.integers(0, 99)


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    code = draw(st.sampled_from(["modules", "modules", "attributes", "wrapped", "functional"]))
    functional = code == "functional"
    streams = draw(st.sampled_from([1, 1, 2, 2, 3]))
    count = draw(st.sampled_from([1, 1, 1, 2] if functional else [1, 1, 1, 1, 1, 2, 2, 2, 3]))
    depths = ([3] if count > 1 else [3, 3, 4]) if functional else ([2, 2, 2, 3] if count > 1 else [2, 2, 3, 4])
    writes = draw(st.sampled_from([False, False, False, False, True]))  # a capture of writes in place costs three others
    return Spec(
        stacks=tuple(draw(stacks(functional, streams, depths, writes)) for _ in range(count)),
        seed=100 * draw(numbers) + draw(numbers),
        code=code,
        streams=streams,
        batch=draw(st.integers(1, 2)),
        places=draw(st.integers(2, 3)),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16])),
        text_first=draw(st.booleans()),
        refine_text=draw(st.sampled_from([0, 0, 2])),
        refine_x=draw(st.sampled_from([0, 0, 0, 2])),
        alternate=count > 1 and draw(st.booleans()),
        time=draw(st.sampled_from(["float32", "bfloat16", "int64", "guidance"])),
        prologue=draw(st.sampled_from(["plain", "plain", "fill", "input"])) if writes else "plain",
        epilogue=draw(st.sampled_from(["plain", "plain", "adaln", "adaln", "start", "tap", *(["scale_"] if writes else [])])),
        returns=draw(st.sampled_from(["tensor", "tuple", "dict", "view"])),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    spec = draw(specs())
    most = sum(stack.depth for stack in spec.stacks) - 2  # of the blocks at the ends; two that are cached make a difference
    ends = draw(st.sampled_from([(0, 0), (0, 0), (1, 0), (0, 1), (1, 1)][: 5 if most >= 2 else 4])) if most >= 1 else (0, 0)
    return Case(
        spec=spec,
        reuse=draw(st.sampled_from(["output", "residual", "taylor"])),
        trigger=draw(st.integers(1, 2)),
        interval=draw(st.integers(1, 2)),
        compute_first=ends[0],
        compute_last=ends[1],
    )
