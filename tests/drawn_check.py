"""Drawn architectures against themselves: which are drawn, the oracle by construction, and the check of one of them."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
from collections import Counter
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import bwcache_compile as bw
from bwcache_compile import passes
from bwcache_compile.capture import capture
from bwcache_compile.runtime import Toolchain
from tests.drawn import Drawn, Short, Spec, Stack, State, Wrapped, example

NAMED_ERRORS = (bw.CaptureError, bw.NoBlocksFoundError, bw.UnsupportedGraphError, bw.ConfigError)


@dataclasses.dataclass(frozen=True, repr=False)
class Case(Short):
    """An architecture, and how it is cached."""

    spec: Spec
    reuse: str = "output"
    mask: tuple[int, ...] = (0, 1, 0, 1, 1)
    compute_first: int = 0
    compute_last: int = 0


@st.composite
def stacks(draw: st.DrawFn, functional: bool, streams: int, deepest: int) -> Stack:
    # a plain function's blocks are told by three equal repetitions, so their ends are drawn alike and no skip tells them apart
    kinds = ["single", "double", "joint", "spacetime"] if streams > 1 else ["single", "spacetime", "single"]
    return Stack(
        kind=draw(st.sampled_from(kinds)),
        depth=draw(st.integers(3 if functional else 2, deepest)),
        mixer=draw(st.sampled_from(["mean", "softmax", "sdpa"])),
        residual=draw(st.sampled_from(["sum", "sum", "sum", "sum", "post", "none", "iadd", "rows", "copy", "scratch"])),
        norm=draw(st.sampled_from(["layer", "layer", "rms", "float", "none", "autocast"])),
        modulation=draw(st.sampled_from(["none", "scale", "scale", "adaln", "adaln", "table", "table", "decay"])),
        constant=draw(st.sampled_from(["none", "factor", "roll", "row"])),
        odd="none" if functional else draw(st.sampled_from(["none", "none", "first", "last"])),
        own=draw(st.booleans()),
        skip="none" if functional else draw(st.sampled_from(["none", "none", "add", "cat"])),
        hints=draw(st.sampled_from([0, 0, 1, 1 if functional else 2])),
        glue=draw(st.sampled_from(["none", "none", "scale", "norm", "linear"])),
        rotary=draw(st.sampled_from([False, False, False, True])),
        feed=draw(st.sampled_from([False, False, True])),
    )


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    code = draw(st.sampled_from(["modules", "modules", "attributes", "wrapped", "functional"]))
    streams = draw(st.integers(1, 3))
    count = draw(st.sampled_from([1, 1, 1, 2, 2] if code == "functional" else [1, 1, 1, 2, 2, 3]))
    return Spec(
        stacks=tuple(draw(stacks(code == "functional", streams, (4, 3, 2)[count - 1])) for _ in range(count)),
        seed=draw(st.integers(0, 9999)),
        code=code,
        streams=streams,
        batch=draw(st.integers(1, 2)),
        places=draw(st.integers(2, 3)),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16])),
        text_first=draw(st.booleans()),
        refine_text=draw(st.sampled_from([0, 2])),
        refine_x=draw(st.sampled_from([0, 0, 2])),
        alternate=count > 1 and draw(st.booleans()),
        time=draw(st.sampled_from(["float32", "bfloat16", "int64", "guidance"])),
        prologue=draw(st.sampled_from(["plain", "plain", "plain", "plain", "fill", "input"])),
        epilogue=draw(st.sampled_from(["plain", "plain", "adaln", "adaln", "start", "tap", "scale_"])),
        returns=draw(st.sampled_from(["tensor", "tuple", "dict", "view"])),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return Case(
        spec=draw(specs()),
        reuse=draw(st.sampled_from(["output", "residual", "taylor"])),
        mask=(0, *draw(st.lists(st.integers(0, 1), min_size=3, max_size=4)), 1),
        compute_first=draw(st.sampled_from([0, 0, 1])),
        compute_last=draw(st.sampled_from([0, 0, 1])),
    )


class Oracle:
    """Runs a drawn model with the values that some of its items change replaced on a reused step."""

    def __init__(self, model: Drawn, items: range, case: Case) -> None:
        self.model, self.items, self.case = model, items, case
        self.kept: list[tuple[State, float]] = []  # what the items changed, at the last two computed steps
        self.step = 0

    def _reused(self, s: State, now: float) -> State:
        last, at = self.kept[-1]
        if self.case.reuse == "residual":
            return {name: s[source(name, s)] + value for name, value in last.items()}
        previous, before = self.kept[-2] if len(self.kept) > 1 else (last, at)
        if self.case.reuse == "output" or at == before:
            return copy.deepcopy(last)
        weight = torch.tensor((now - at) / (at - before), dtype=torch.float32)
        return {name: (v.float() + weight * (v.float() - previous[name].float())).to(v.dtype) for name, v in last.items()}

    def __call__(self, inputs: dict[str, Tensor]) -> Any:
        model, items, time = self.model, self.items, self.model.spec.time
        now = float(inputs["t"][0]) if time == "float32" else float(self.step)
        s = model.start(inputs)
        model.run_items(s, range(items.start))
        if self.case.mask[self.step]:
            s |= self._reused(s, now)
        else:
            entered, before = copy.deepcopy(s), dict(s)
            model.run_items(s, items)
            changed = {n: v for n, v in s.items() if before.get(n) is not v or not torch.equal(v, entered[n])}
            if self.case.reuse == "residual":
                changed = {n: v - entered[source(n, entered)] for n, v in changed.items() if entered[source(n, entered)].shape == v.shape}
            self.kept.append((copy.deepcopy(changed), now))
        model.run_items(s, range(items.stop, len(model.items)))
        self.step += 1
        return model.finish(s)


def source(name: str, entered: State) -> str:
    """Name the value that a value continues."""
    return name if name in entered else name.partition(":")[0] if name.partition(":")[0] in entered else "x"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a case that is not wrong.

    Attributes:
        refused: The error that was raised and what it said; empty if the model was transformed.
        fallback: The error that `reuse="residual"` raised; the case was then checked with "output".
        exact: Whether the forced run is the oracle's bit for bit.
        matters: Whether reusing made a difference at all.
        whole: Whether every block of the main stacks is cached, those at the ends left out that the case leaves out.
    """

    refused: str = ""
    fallback: str = ""
    exact: bool = True
    matters: bool = True
    whole: bool = True


def refusal(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def run(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Run on a copy of the inputs; return the output and what became of the copy. The output itself is overwritten after."""
    given = {name: value.clone() for name, value in inputs.items()}
    with torch.no_grad():
        output = model(**given)
        kept = copy.deepcopy(output)
        for leaf in pytree.tree_leaves(output):
            leaf.fill_(7)
    return kept, given


def assert_equal(actual: Any, expected: Any, what: str) -> None:
    """Assert that two outputs are the same bit for bit, their structure included."""
    left, left_spec = pytree.tree_flatten(actual)
    right, right_spec = pytree.tree_flatten(expected)
    assert left_spec == right_spec, what
    for a, b in zip(left, right, strict=True):
        assert a.dtype == b.dtype, what
        assert torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)), f"{what}: {(a.double() - b.double()).abs().max()}"


def close(actual: Any, expected: Any, dtype: torch.dtype) -> bool:
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    return all(
        torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance * max(1.0, float(b.float().abs().max())), equal_nan=True)
        for a, b in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True)
    )


def ranges(model: Drawn, names: list[str], case: Case) -> list[range]:
    """Return the items that the cached blocks may span, the likeliest first.

    Where blocks are modules, their names say it. A plain function's blocks have none: any run of as many will do.
    """
    placed = {item.block: number for number, item in enumerate(model.items) if item.block}
    if all(name in placed for name in names):
        return [range(placed[names[0]], placed[names[-1]] + 1)]
    assert model.spec.code == "functional", f"{names} are no blocks"
    numbers = list(placed.values())
    runs = [range(a, b + 1) for i, a in enumerate(numbers) for b in numbers[i:]]
    return sorted((r for r in runs if sum(n in r for n in numbers) >= 2), key=len, reverse=True)


def check(case: Case) -> Outcome:
    """Transform the model of a case and compare: with eager at threshold 0, with the oracle under a forced mask.

    Raises:
        AssertionError: Something differs.
    """
    spec = case.spec
    inner = Drawn(spec).eval()
    model = Wrapped(inner).eval() if spec.code == "wrapped" else inner
    prefix = "model." if spec.code == "wrapped" else ""
    try:
        captured = capture(model, (), dict(sorted(example(spec, 0).items())))
    except bw.CaptureError as error:
        return Outcome(refusal(error))
    toolchain = Toolchain(lambda *_: captured.fresh(), passes.build, passes.explain)

    def transformed(config: bw.CacheConfig) -> bw.CachedModel:
        cached = bw.CachedModel(model, config, toolchain)
        cached.prepare((), example(spec, 0))
        return cached

    ends = {"compute_first": case.compute_first, "compute_last": case.compute_last}
    try:
        cached = transformed(bw.CacheConfig(threshold=0, num_steps=3, **ends))
    except NAMED_ERRORS as error:
        return Outcome(refusal(error))
    for step in range(3):
        (expected, left), (actual, given) = run(model, example(spec, step)), run(cached, example(spec, step))
        assert_equal(actual, expected, f"step {step}")
        assert_equal(given, left, f"the caller's tensors after step {step}")
    fallback = ""
    try:
        cached = transformed(bw.CacheConfig(policy="static", steps_mask=case.mask, reuse=case.reuse, **ends))
    except bw.ConfigError as error:
        fallback, case = refusal(error), dataclasses.replace(case, reuse="output")
        cached = transformed(bw.CacheConfig(policy="static", steps_mask=case.mask, **ends))
    names = [block.name.removeprefix(prefix) for block in cached.plan.blocks]
    steps = [run(cached, example(spec, step))[0] for step in range(len(case.mask))]
    for items in ranges(inner, names, case):
        oracle = Oracle(inner, items, case)
        try:
            expected = [oracle_step(oracle, example(spec, step)) for step in range(len(case.mask))]
        except KeyError:  # a residual of these items is not defined
            continue
        if all(close(a, b, spec.dtype) for a, b in zip(steps, expected, strict=True)):
            break
    else:
        raise AssertionError(f"{names}: no run of the oracle gives what the cached model gave")
    main = [item.block for item in inner.items if item.block and not item.block.startswith("side_")]
    wanted = len(main) - case.compute_first - case.compute_last
    full = [run(model, example(spec, step))[0] for step in range(len(case.mask))]
    return Outcome(
        fallback=fallback,
        exact=all(map(same, steps, expected)),
        matters=not all(close(a, b, spec.dtype) for a, b in zip(steps, full, strict=True)),
        whole=len(set(names) & set(main)) >= wanted if names[0] in main else len(names) >= wanted,
    )


def same(left: Any, right: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(pytree.tree_leaves(left), pytree.tree_leaves(right), strict=True))


def oracle_step(oracle: Oracle, inputs: dict[str, Tensor]) -> Any:
    with torch.no_grad():
        return copy.deepcopy(oracle(inputs))


def tally(outcomes: list[Outcome]) -> dict[str, Any]:
    """Count outcomes; refusals are counted by error and reason, names and numbers left out."""
    refused = Counter(plain(o.refused) for o in outcomes if o.refused)
    right = [o for o in outcomes if not o.refused]
    return {
        "examples": len(outcomes),
        "right": len(right),
        "right, and equal to the oracle bit for bit": sum(o.exact for o in right),
        "right, and every main block cached": sum(o.whole for o in right),
        "right, and reusing made a difference": sum(o.matters for o in right),
        "right, with residuals refused": sum(bool(o.fallback) for o in right),
        "refused": dict(refused.most_common()),
    }


def plain(message: str) -> str:
    """Return a refusal without names, numbers and advice, so that equal reasons are equal."""
    kind, _, text = message.partition(": ")
    lines = [line.strip() for line in text.splitlines()]
    reason = next((line for before, line in itertools.pairwise(lines) if before.startswith("Nearest candidate")), lines[0])
    return f"{kind}: " + re.sub(r"`[^`]*`|\S*[0-9_.]\S*\w|\[[^]]*\]", "..", reason)
