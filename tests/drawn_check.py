"""Drawn architectures against themselves: the oracle by construction, and the check of one case."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import bwcache_compile as bw
from bwcache_compile import passes
from bwcache_compile.capture.capture import capture
from bwcache_compile.ir.compare import clone_tensors
from bwcache_compile.runtime import Toolchain
from tests.drawn import Drawn, State, Wrapped, example
from tests.drawn_cases import STEPS, Case
from tests.drawn_replay import extrapolated, replayed

NAMED_ERRORS = (bw.CaptureError, bw.NoBlocksFoundError, bw.UnsupportedGraphError, bw.ConfigError)


class Oracle:
    """Runs a drawn model with the values that some of its items change replaced on a reused step.

    Items among them that are `apart` run at every step, and before the others, of which they need nothing.
    """

    def __init__(self, model: Drawn, items: range, case: Case, apart: Sequence[int] = ()) -> None:
        self.model, self.items, self.case, self.apart = model, items, case, apart
        self.kept: list[tuple[State, float]] = []  # what the items changed, at the last two computed steps
        self.step = 0

    def _reused(self, s: State, now: float) -> State:
        def held(name: str, last: Tensor) -> Tensor:
            if self.case.reuse == "residual":
                return s[source(name, s)].reshape(last.shape) + last
            kept = [(at, values[name]) for values, at in self.kept[-2:]]
            return extrapolated(now, kept) if self.case.reuse == "taylor" else last.clone()

        return each_once(held, self.kept[-1][0])

    def __call__(self, inputs: dict[str, Tensor]) -> Any:
        model, items, time = self.model, self.items, self.model.spec.time
        now = float(inputs["t"][0]) if time == "float32" else float(self.step)
        s = model.start(inputs)
        model.run_items(s, [*range(items.start), *self.apart])
        if self.case.reused[self.step]:
            s |= self._reused(s, now)
        else:
            entered, before = copy.deepcopy(s), dict(s)
            model.run_items(s, [number for number in items if number not in self.apart])
            changed = {n: v for n, v in s.items() if before.get(n) is not v or not torch.equal(v, entered[n])}
            if self.case.reuse == "residual":
                sources = {n: entered[source(n, entered)] for n in changed}  # a stream may enter in another layout
                changed = {n: v for n, v in changed.items() if sources[n].numel() == v.numel()}
                changed = each_once(lambda n, v: v - sources[n].reshape(v.shape), changed)
            self.kept.append((copy.deepcopy(changed), now))
        model.run_items(s, range(items.stop, len(model.items)))
        self.step += 1
        return model.finish(s)


def each_once(make: Callable[[str, Tensor], Tensor], values: State) -> State:
    """Make a value from each; names of one tensor, which later items may edit in place, are names of one tensor again."""
    made: dict[int, Tensor] = {}
    for name, value in values.items():
        if id(value) not in made:
            made[id(value)] = make(name, value)
    return {name: made[id(value)] for name, value in values.items()}


class Watched(dict[str, Tensor]):
    """Named values that remember which were read."""

    def __init__(self, s: State) -> None:
        super().__init__(s)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)


def independent(model: Drawn, items: range, names: list[str], inputs: dict[str, Tensor]) -> list[int]:
    """Return the items that need nothing of the named blocks, directly or through other items."""
    s = model.start(clone_tensors(inputs))
    model.run_items(s, range(items.start))
    depends: set[str] = set()
    found = []
    for number in items:
        watched, before = Watched(s), copy.deepcopy(s)
        model.run_items(watched, [number])
        s = dict(watched)
        if model.items[number].block in names or watched.read & depends:
            depends |= {name for name, value in s.items() if name not in before or not same(value, before[name])}
        else:
            found.append(number)
    return found


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
        by_items: Whether the oracle replaced whole items; else it replayed the captured graph.
        whole: Whether every block of the main stacks is cached, those at the ends left out that the case leaves out.
    """

    refused: str = ""
    fallback: str = ""
    exact: bool = True
    matters: bool = True
    by_items: bool = True
    whole: bool = True


def refusal(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def run(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Run on a copy of the inputs; return the output and what became of the copy. The output itself is overwritten after."""
    given = clone_tensors(inputs)
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
        a.shape == b.shape
        and torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance * max(1.0, float(b.float().abs().max())), equal_nan=True)
        for a, b in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True)
    )


def ranges(model: Drawn, names: list[str]) -> list[range]:
    """Return the items that the cached blocks may span, the likeliest first.

    Where blocks are modules, their names say it, up to what changes the layout around them. Repeated operators have none, in a plain
    function above all: any run that holds the named ones will do, with or without the glue behind its last block.
    """
    placed = {item.block: number for number, item in enumerate(model.items) if item.block}
    known = [placed[name] for name in names if name in placed]
    if len(known) == len(names):
        before = max((number for number in placed.values() if number < known[0]), default=-1)
        behind = min((number for number in placed.values() if number > known[-1]), default=len(model.items))
        return [range(start, stop) for start in range(known[0], before, -1) for stop in range(known[-1] + 1, behind + 1)]
    runs = [range(a, b) for a in placed.values() for b in range(a + 1, len(model.items) + 1)]
    return sorted((run for run in runs if all(n in run for n in known)), key=len, reverse=True)


def matching(model: Drawn, names: list[str], case: Case, steps: list[Any], inputs: list[dict[str, Tensor]]) -> list[Any] | None:
    """Return what the oracle gives where the items it replaces are those that gave `steps`; None where no items do."""
    for items, apart in choices(model, names, inputs[0]):
        oracle = Oracle(model, items, case, apart)
        try:
            with torch.no_grad():
                expected = [copy.deepcopy(oracle(clone_tensors(given))) for given in inputs]
        except (KeyError, RuntimeError):  # a residual of these items is not defined, or they leave the stream in another layout
            continue
        if all(close(a, b, case.spec.dtype) for a, b in zip(steps, expected, strict=True)):
            return expected
    return None


def choices(model: Drawn, names: list[str], inputs: dict[str, Tensor]) -> Iterator[tuple[range, list[int]]]:
    """Yield the items that the cached blocks may span, and those among them that may run at every step."""
    known = set(names) <= {item.block for item in model.items}
    for items in ranges(model, names):
        yield items, []
        if known and (apart := independent(model, items, names, inputs)):
            yield items, apart


def check(case: Case) -> Outcome:
    """Transform the model of a case and compare: with eager at threshold 0, with the oracle where reuse is forced.

    Raises:
        AssertionError: Something differs.
    """
    spec = case.spec
    inner = Drawn(spec).eval()
    model = Wrapped(inner).eval() if spec.code == "wrapped" else inner
    prefix = "model." if spec.code == "wrapped" else ""
    inputs = [example(spec, step) for step in range(STEPS)]
    try:
        captured = capture(model, (), dict(sorted(inputs[0].items())))
    except bw.CaptureError as error:
        return Outcome(refusal(error))

    def transformed(reuse: Any) -> bw.CachedModel:
        config = bw.CacheConfig(
            threshold=0, num_steps=STEPS, tail=0, reuse=reuse, compute_first=case.compute_first, compute_last=case.compute_last
        )
        cached = bw.CachedModel(model, config, Toolchain(lambda *_, **__: captured.fresh(), passes.build, passes.explain))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", bw.CacheWarning)  # at this width the projections before and behind are a large share
            cached.prepare((), inputs[0])
        return cached

    fallback = ""
    try:
        try:
            cached = transformed(case.reuse)
        except bw.ConfigError as error:
            if case.reuse != "residual":
                raise
            fallback, case = refusal(error), dataclasses.replace(case, reuse="output")
            cached = transformed("output")
    except NAMED_ERRORS as error:
        return Outcome(refusal(error), fallback)
    eager = [run(model, given) for given in inputs]
    assert all(leaf.isfinite().all() for output, _ in eager for leaf in pytree.tree_leaves(output)), "the drawn model itself overflows"
    for step in range(3):
        expected, left = eager[step]
        actual, given = run(cached, inputs[step])
        assert_equal(actual, expected, f"step {step}")
        assert_equal(given, left, f"the caller's tensors after step {step}")
    cached.configure(threshold=math.inf, warmup_steps=case.trigger, reuse_interval=case.interval)
    cached.reset()
    steps = [run(cached, given)[0] for given in inputs]
    for step, reused in enumerate(case.reused):
        if not reused:
            assert_equal(steps[step], eager[step][0], f"the computed step {step} of a forced run")
    names = [block.name.removeprefix(prefix) for block in cached.plan.blocks]
    expected = matching(inner, names, case, steps, inputs)
    by_items = expected is not None
    if expected is None:
        assert not set(names) <= {item.block for item in inner.items}, f"{names}: no run of the oracle gives what the cached model gave"
        expected = replayed(captured, cached.plan.regions[0], case, inputs)
        for step in range(STEPS):
            assert close(steps[step], expected[step], spec.dtype), f"{names}: step {step} is not the captured graph's with kept values"
    main = [item.block for item in inner.items if item.block and not item.block.startswith("side_")]
    wanted = len(main) - case.compute_first - case.compute_last
    return Outcome(
        fallback=fallback,
        exact=all(map(same, steps, expected)),
        matters=not all(close(a, b, spec.dtype) for a, (b, _) in zip(steps, eager, strict=True)),
        by_items=by_items,
        whole=sum(not name.startswith("side_") for name in names) >= wanted,
    )


def same(left: Any, right: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(pytree.tree_leaves(left), pytree.tree_leaves(right), strict=True))


def tally(outcomes: list[Outcome]) -> dict[str, Any]:
    """Count outcomes; refusals are counted by error and reason, names and numbers left out."""
    refused = Counter(plain(o.refused) for o in outcomes if o.refused)
    residuals = Counter(plain(o.fallback) for o in outcomes if o.fallback)
    right = [o for o in outcomes if not o.refused]
    return {
        "examples": len(outcomes),
        "right": len(right),
        "right, and equal to the oracle bit for bit": sum(o.exact for o in right),
        "right, and the cut lies inside an item": sum(not o.by_items for o in right),
        "right, and every main block cached": sum(o.whole for o in right),
        "right, and reusing made a difference": sum(o.matters for o in right),
        "refused": dict(refused.most_common()),
        "residuals refused, and outputs held instead": dict(residuals.most_common()),
    }


def plain(message: str) -> str:
    """Return a refusal without names, numbers and advice, so that equal reasons are equal."""
    kind, _, text = message.partition(": ")
    lines = [line.strip() for line in text.splitlines()]
    reason = next((line for before, line in itertools.pairwise(lines) if before.startswith("Nearest candidate")), lines[0])
    reason = re.sub(r", and for .* no such input was found.*", "", re.sub("Drawn|Wrapped", "the model", reason))
    return f"{kind}: " + re.sub(r"`[^`]*`|\S*[0-9_.]\S*\w|\[[^]]*\]", "..", reason)
