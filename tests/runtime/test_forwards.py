"""How often a model really runs: two forwards at a first call and at a new size, one at every other call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import bwcache_compile as bw
from tests.models import OneStream, noise
from tests.runtime.helpers import run

STATIC = bw.CacheConfig(policy="static", steps_mask=(0, 1, 0, 1))
OFF = bw.CacheConfig(threshold=0, num_steps=4)

library = torch.library.Library("bwcache_tests", "DEF")
library.define("seen(Tensor x) -> Tensor")
RUNS: list[int] = []


@torch.library.impl(library, "seen", "CPU")
def _seen(x: Tensor) -> Tensor:
    RUNS.append(len(x))
    return x.clone()


@torch.library.register_fake("bwcache_tests::seen", lib=library)
def _fake(x: Tensor) -> Tensor:
    assert isinstance(x, FakeTensor)
    return torch.empty_like(x)


class Counted(OneStream):
    """Counts its runs on real tensors, eager ones and those of its graphs."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(torch.ops.bwcache_tests.seen(x), t)


def inputs(tokens: int, step: int = 0) -> tuple[Tensor, Tensor]:
    return noise("x", step, 2, tokens, 4), torch.full((2,), 1 - step / 8)


@pytest.fixture
def forwards() -> Iterator[Callable[[], int]]:
    """Return how often a model ran since this was asked last."""

    def count() -> int:
        seen = len(RUNS)
        RUNS.clear()
        return seen

    RUNS.clear()
    yield count
    RUNS.clear()


@pytest.mark.parametrize("guard", ["host", "graph"])
def test_a_first_call_and_a_new_size_cost_two_forwards(forwards: Callable[[], int], guard: Any) -> None:
    model = Counted().eval()
    cached = bw.transform(model, OFF, guard=guard)
    counts = []
    for tokens, step in ((6, 0), (6, 1), (9, 0), (9, 1), (12, 0), (12, 1), (6, 0)):
        output = run(cached, *inputs(tokens, step))
        counts.append(forwards())
        assert torch.equal(output, run(model, *inputs(tokens, step)))
        forwards()
    assert counts == [2, 1, 2, 1, 2, 1, 2], "the program of dynamic sizes is checked at the first size too"
    assert cached.report().captures == 2


def test_examples_cost_two_forwards(forwards: Callable[[], int]) -> None:
    bw.transform(Counted().eval(), bw.CacheConfig(), example_args=inputs(6))
    assert forwards() == 2


def test_the_checked_result_is_the_steps(forwards: Callable[[], int]) -> None:
    model = Counted().eval()
    checked, plain = (bw.transform(model, bw.CacheConfig(num_steps=8, threshold=1e9)) for _ in range(2))
    plain.prepare(inputs(6))
    for step in range(8):
        assert torch.equal(run(checked, *inputs(6, step)), run(plain, *inputs(6, step)))
    assert str(checked.report().contexts["default"]) == str(plain.report().contexts["default"])


def test_a_recapture_within_a_generation_computes_its_own_step(forwards: Callable[[], int]) -> None:
    model = Counted().eval()
    cached = bw.transform(model, STATIC)
    run(cached, *inputs(6))
    model.head = nn.Linear(8, 4)
    assert torch.equal(run(cached, *inputs(6, 1)), run(model, *inputs(6, 1)))
    assert [record.step for record in cached.report().contexts["default"].steps] == [0, 1]


class Rounds(Counted):
    """Traces into a graph that rounds differently."""

    factor = 1e-6

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out = super().forward(x, t)
        return out * (1 + self.factor) if torch.compiler.is_exporting() else out


class Wrong(Rounds):
    factor = 0.1


def test_close_allows_rounding_and_nothing_more() -> None:
    model = Rounds().eval()
    with pytest.raises(bw.CaptureError, match="outputs of the captured graph differ from the model's"):
        run(bw.transform(model, OFF), *inputs(6))
    assert torch.allclose(run(bw.transform(model, OFF, verify="close"), *inputs(6)), run(model, *inputs(6)))
    with pytest.raises(bw.CaptureError, match="outputs of the captured graph differ from the model's"):
        run(bw.transform(Wrong().eval(), OFF, verify="close"), *inputs(6))


def test_nothing_is_compared_where_so_asked(forwards: Callable[[], int]) -> None:
    cached = bw.transform(Wrong().eval(), OFF, verify=False)
    counts = []
    for tokens in (6, 9, 12):
        run(cached, *inputs(tokens))
        counts.append(forwards())
    assert counts == [2, 1, 1], "it ran once before it was exported"


def test_copies_verify_as_the_original_does() -> None:
    cached = copy.copy(bw.transform(Wrong().eval(), OFF, verify=False))
    run(cached, *inputs(6))
    with pytest.raises(bw.ConfigError, match="verify must be one of 'bitwise', 'close', False, got 'exact'"):
        bw.transform(Counted(), verify="exact")  # type: ignore[arg-type]


def test_warnings_point_at_the_callers_line() -> None:
    model = Counted().eval()
    cached = bw.transform(model, bw.CacheConfig(num_steps=4, threshold=1e-9))
    for step in range(3):
        run(cached, *inputs(6, step))
    with pytest.warns(bw.CacheWarning, match="no step of context") as caught:
        cached(*inputs(6, 3))
    assert [str(warning.filename) for warning in caught] == [__file__]
