"""Models without a whole graph whose outputs are kept: a reused step runs nothing of them."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import bwcache_compile as bw
from tests.models import OneStream, noise
from tests.opaque.test_opaque import Plain, Resisting, computed
from tests.region.test_region import Branching
from tests.uncaptured import MASK, STEPS, check_contexts, check_time_as_a_number, inputs, outputs, same

CUT = bw.CacheConfig(policy="static", steps_mask=MASK, cut="output")
WEIGHTS = (None, None, (1.5, -0.5, 0.0), None, (1.2, 0.3, -0.5), (2.0, -1.5, 0.5))
TABLE = dataclasses.replace(CUT, reuse="linear", anchors=3, weights=WEIGHTS)


@pytest.fixture(params=["opaque", "region"])
def capture(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("make", [Resisting, Branching])
def test_a_reused_step_runs_nothing_of_the_model(make: Callable[[], OneStream], capture: Any) -> None:
    model = make().eval()
    ran: list[int] = []
    for module in (model, model.patch, model.head, *model.blocks):
        module.register_forward_pre_hook(lambda *_: ran.append(1))
    cached = bw.transform(model, CUT, capture=capture)
    made, counts = [], []
    for step in range(STEPS):
        ran.clear()
        with torch.no_grad():
            made.append(cached(*inputs(step)))
        counts.append(len(ran))
    assert counts == [6 * (not reused) for reused in MASK], "the first step too: no block is looked for"
    want = outputs(model)
    assert same(made, [want[step] for step in (0, 1, 1, 3, 3, 3)])
    assert computed(cached) == [not reused for reused in MASK]


@pytest.mark.parametrize("settings", [CUT, TABLE, dataclasses.replace(CUT, reuse="taylor")], ids=["output", "table", "taylor"])
def test_the_same_settings_give_what_a_whole_capture_gives(settings: bw.CacheConfig) -> None:
    model = OneStream().eval()
    want = outputs(bw.transform(model, settings))
    for capture in ("opaque", "region"):
        assert same(outputs(bw.transform(model, settings, capture=capture)), want)


def test_a_table_of_weights_by_hand(capture: Any) -> None:
    model = Resisting().eval()
    made, full = outputs(bw.transform(model, TABLE, capture=capture)), outputs(model)
    torch.testing.assert_close(made[2], 1.5 * full[1] - 0.5 * full[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made[5], 2 * full[3] - 1.5 * full[1] + 0.5 * full[0], rtol=1e-5, atol=1e-6)


@dataclasses.dataclass
class Unregistered:
    """Holds a tensor, and pytree does not know it."""

    sample: Tensor


class Returning(Resisting):
    """Returns what it is told to make of its output."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor, t: Tensor) -> Any:  # type: ignore[override]
        return self.make(super().forward(x, t))


@pytest.mark.parametrize(
    "make",
    [
        lambda y: (y, y * 2),
        lambda y: {"sample": y, "more": [y + 1, None, "text"]},
        lambda y: Transformer2DModelOutput(sample=y),
        lambda y: (y.bfloat16(), y.double()),
    ],
)
def test_the_structure_of_the_output_is_kept(make: Callable[[Tensor], Any], capture: Any) -> None:
    model = Returning(make).eval()
    made, want = outputs(bw.transform(model, TABLE, capture=capture)), outputs(model)
    flat = torch.utils._pytree.tree_flatten
    for step, reused in enumerate(MASK):
        (leaves, spec), (expected, like) = flat(made[step]), flat(want[step])
        assert spec == like
        assert type(made[step]) is type(want[step])
        for got, held in zip(leaves, expected, strict=True):
            assert (got.dtype, got.shape) == (held.dtype, held.shape) if isinstance(held, Tensor) else got == held
            assert not isinstance(held, Tensor) or torch.equal(got, held) != bool(reused)


class Counting(Branching):
    """Returns whole numbers beside its output."""

    def forward(self, x: Tensor, t: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, t), (t * 8).to(torch.int64)


def test_whole_numbers_are_held(capture: Any) -> None:
    made = outputs(bw.transform(Counting().eval(), CUT, capture=capture))
    assert [int(numbers[0]) for _, numbers in made] == [8, 7, 7, 5, 5, 5]


def test_whole_numbers_have_no_sum(capture: Any) -> None:
    cached = bw.transform(Counting().eval(), CUT, reuse="taylor", capture=capture)
    said = r"reuse='taylor' requires floating-point outputs of the model; output 1 of Counting is int64\[2\]"
    with pytest.raises(bw.ConfigError, match=said):
        outputs(cached)


class WritingModel(Resisting):
    """Writes to its input."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x.mul_(1.5), t)


@pytest.mark.parametrize(
    ("model", "error", "said"),
    [
        (Returning(Unregistered), bw.CaptureError, r"Returning returns an object of type Unregistered, but a reused step can return only"),
        (Returning(lambda y: float(y.mean())), bw.CaptureError, "Returning returns no tensor, so there is nothing to reuse"),
        (WritingModel(), bw.UnsupportedGraphError, r"WritingModel writes in place to a tensor of shape \[2, 6, 4\] that it is given"),
    ],
)
def test_what_cannot_be_kept_is_refused(model: nn.Module, error: type[Exception], said: str, capture: Any) -> None:
    with pytest.raises(error, match=said):
        outputs(bw.transform(model.eval(), CUT, capture=capture))


def test_what_is_returned_shares_no_memory_with_what_is_kept(capture: Any) -> None:
    model = Resisting().eval()
    for settings in (CUT, TABLE):
        want = outputs(bw.transform(model, settings, capture=capture))
        cached = bw.transform(model, settings, capture=capture)
        with torch.no_grad():
            for step in range(STEPS):
                made = cached(*inputs(step))
                assert torch.equal(made, want[step])
                made.zero_()


def test_a_model_without_blocks_needs_none(capture: Any) -> None:
    model = nn.Linear(4, 4).eval()
    x = [noise("x", step, 2, 4) for step in range(STEPS)]
    cached = bw.transform(model, CUT, capture=capture)
    with torch.no_grad():
        assert same([cached(each) for each in x], [model(x[step]) for step in (0, 1, 1, 3, 3, 3)])
        with pytest.raises(bw.CaptureError, match=r'Linear has no blocks.*With cut="output" and a policy that measures nothing'):
            bw.transform(model, num_steps=STEPS, policy="adaptive", cut="output", capture=capture)(x[0])


def test_a_policy_that_measures_decides_as_on_a_whole_capture() -> None:
    model = OneStream(depth=4).eval()
    settings = bw.CacheConfig(num_steps=12, threshold=0.2, reuse_interval=2, indicator_tokens="all", cut="output")
    whole = bw.transform(model, settings)
    others = [bw.transform(model, settings, capture=capture) for capture in ("opaque", "region")]
    with torch.no_grad():
        for step in range(12):
            x, t = noise("x", step, 2, 6, 4), torch.full((2,), 1 - step / 16)
            want = whole(x, t)
            assert all(torch.equal(cached(x, t), want) for cached in others), step
    for cached in others:
        assert computed(cached) == computed(whole)
        assert False in computed(cached)
        one, other = (c.report().contexts["default"].steps[1].change for c in (cached, whole))
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
        assert cached.report().blocks == whole.report().blocks


def test_no_output_of_a_block_is_kept(capture: Any) -> None:
    cached = bw.transform(Resisting(depth=5).eval(), TABLE, capture=capture)
    outputs(cached, 4)
    size = 2 * 6 * 4 * 4  # batch, tokens, channels, bytes
    assert 3 * size <= cached.report().contexts["default"].state_bytes < 4 * size
    measured = bw.transform(Resisting(depth=5).eval(), TABLE, policy="guarded", indicator_blocks=2, capture=capture)
    outputs(measured, 4)
    sample = 8 * 4  # one token of twelve
    assert measured.report().contexts["default"].state_bytes == cached.report().contexts["default"].state_bytes + 2 * sample
    assert measured.report().blocks == ("blocks.2", "blocks.4")


def test_contexts_and_runs_that_were_broken_off(capture: Any) -> None:
    check_contexts(bw.transform(Resisting().eval(), TABLE, capture=capture))


def test_the_time_as_a_number(capture: Any) -> None:
    model = Plain().eval()
    check_time_as_a_number(bw.transform(model, CUT, capture=capture), model)


def test_other_weights_and_other_modules(capture: Any) -> None:
    model = Resisting().eval()
    cached = bw.transform(model, policy="static", steps_mask=(0, 1, 1, 1, 1, 1), cut="output", capture=capture)
    with torch.no_grad():
        for change in (lambda: model.head.weight.mul_(2), lambda: model.__setattr__("head", nn.Linear(8, 4).eval())):
            cached.reset()
            cached(*inputs(0))
            assert not torch.equal(cached(*inputs(1)), model(*inputs(1)))
            change()
            assert torch.equal(cached(*inputs(2)), model(*inputs(2)))
            assert "before step 2: the cache was cleared" in cached.report().warnings[-1]


def test_the_cut_is_changed_at_run_time(capture: Any) -> None:
    model = Branching().eval()
    blocks, output = dataclasses.replace(CUT, cut="blocks"), CUT
    want = {settings: outputs(bw.transform(model, settings, capture=capture)) for settings in (blocks, output)}
    cached = bw.transform(model, blocks, capture=capture)
    told: list[bw.StepEvent] = []
    cached.on_step(told.append)
    for settings in (blocks, output, blocks, output):
        told.clear()
        cached.configure(settings)
        assert same(outputs(cached), want[settings])
        assert [event.computed for event in told] == [not reused for reused in MASK]
        assert [event.context for event in told] == ["default"] * STEPS
    assert repr(cached) == f"{capture.capitalize()}Model(Branching, policy='static', reuse='output', cut='output')"
    assert cached.cached_blocks == ()


def test_a_copy_starts_afresh(capture: Any) -> None:
    cached = bw.transform(Resisting().eval(), TABLE, capture=capture, example_args=inputs(0))
    want = outputs(cached)
    for other in (copy.deepcopy(cached), pickle.loads(pickle.dumps(cached))):
        assert same(outputs(other), want)
        assert other.original is not cached.original
    cached.close()
    assert same(outputs(cached), want)


def test_blocks_are_compiled(capture: Any) -> None:
    model = OneStream().eval()
    cached = bw.transform(model, TABLE, capture=capture)
    want = outputs(cached)
    counter = CompileCounter()
    cached.compile(backend=counter, fullgraph=True)
    for got, expected in zip(outputs(cached), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1, "equal blocks are compiled once"
    other = bw.transform(model, TABLE, capture=capture)
    with torch.no_grad():
        made = [other(*inputs(step)) for step in range(2)]
        other.compile(backend="eager")  # in the middle of a run, before a reused step
        made += [other(*inputs(step)) for step in range(2, STEPS)]
    for got, expected in zip(made, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_the_models_own_attributes(capture: Any) -> None:
    model = Resisting().eval()
    cached = bw.transform(model, CUT, capture=capture)
    outputs(cached)
    assert cached.calls == model.calls == 3
    assert list(dict(model.named_children())) == list(dict(Resisting().named_children()))


def test_the_first_way_that_works_captures_no_stack_for_nothing() -> None:
    model = Branching().eval()
    with pytest.warns(bw.CacheWarning, match="Branching is captured as 'opaque'"):
        cached = bw.transform(model, CUT, capture="auto", example_args=inputs(0))
    assert isinstance(cached, Branching)
    assert repr(cached).startswith("OpaqueModel(")
