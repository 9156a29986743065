"""Models of which no graph can be made: the calls of their blocks are guarded."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import bwcache_compile as bw
from tests.models import Block, OneStream, TwoStream, noise
from tests.uncaptured import COMPUTE, MASK, STATIC, STEPS, check_contexts, check_time_as_a_number, inputs, outputs, same


class HostBlock(Block):
    """Sorts on the host, as experts that are routed there do."""

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        values = temb.mean((0, 1)).tolist()
        return super().forward(x, temb[..., sorted(range(len(values)), key=values.__getitem__)])


class Resisting(OneStream):
    """Its blocks cannot be captured, and each one gets another embedding, made in between."""

    calls = 0

    def __init__(self, depth: int = 3, block: type[Block] = HostBlock) -> None:
        super().__init__(depth)
        self.blocks = nn.ModuleList(block(8) for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor, skip: bool = False) -> Tensor:
        self.calls += 1
        h, temb = self.patch(x), self.embed(t)
        for place, block in enumerate(self.blocks):
            if not (skip and place == 1):
                h = block(h, temb * (1 + place))
                h.mul_(1.01)  # what a block returned is written to
        return self.head(h)


class Thinning(Resisting):
    """Leaves its second block out late in the run; nothing in its inputs shows that but the values of the time."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, t, skip=bool(t.mean() < 0.6))


class Writing(Resisting):
    """Its blocks write to what they are given."""

    def __init__(self) -> None:
        class WritingBlock(Block):
            def forward(self, x: Tensor, temb: Tensor) -> Tensor:
                x.add_(1)
                return super().forward(x, temb)

        super().__init__(block=WritingBlock)


class Plain(OneStream):
    """Takes the time as a number."""

    def forward(self, x: Tensor, t: float) -> Tensor:  # type: ignore[override]
        return super().forward(x, torch.full((x.shape[0],), t))


def computed(cached: Any, name: str = "default") -> list[bool]:
    return [record.computed for record in cached.report().contexts[name].steps]


def held(model: Resisting, mask: tuple[int, ...] = MASK) -> list[Tensor]:
    """What a run on a mask returns that holds the outputs of the last block, computed by hand."""
    made, kept = [], torch.zeros(0)
    for step, reused in enumerate(mask):
        x, t = inputs(step)
        with torch.no_grad():
            if not reused:
                h, temb = model.patch(x), model.embed(t)
                for place, block in enumerate(model.blocks):
                    h = block(h, temb * (1 + place))
                    kept = h.clone()
                    h = h * 1.01
            made.append(model.head(kept * 1.01))
    return made


@pytest.mark.parametrize("make", [Resisting, OneStream, TwoStream])
def test_threshold_zero_is_the_model_bit_for_bit(make: Callable[[], OneStream]) -> None:
    model = make().eval()
    cached = bw.transform(model, COMPUTE, capture="opaque")
    want = outputs(model)
    assert same(outputs(cached), want)
    assert same(outputs(cached), want), "another run"
    assert computed(cached) == [True] * STEPS


def test_a_reused_step_returns_what_the_blocks_returned_last() -> None:
    model = Resisting().eval()
    cached = bw.transform(model, STATIC, capture="opaque")
    assert same(outputs(cached), held(model))
    assert not torch.allclose(outputs(cached)[5], outputs(model)[5], atol=1e-3), "reuse makes a difference"
    assert computed(cached) == [not reused for reused in MASK]


def test_blocks_are_not_run_at_a_reused_step() -> None:
    model = Resisting().eval()
    ran: list[int] = []
    for block in model.blocks:
        block.register_forward_hook(lambda *_: ran.append(1))
    cached = bw.transform(model, STATIC, capture="opaque", example_args=inputs(0))
    counts = []
    for step in range(STEPS):
        ran.clear()
        with torch.no_grad():
            cached(*inputs(step))
        counts.append(len(ran))
    assert counts == [3 * (not reused) for reused in MASK]


def test_taylor_continues_the_line_through_two_steps() -> None:
    model = Resisting().eval()
    cached = bw.transform(model, STATIC, reuse="taylor", capture="opaque")
    made, kept = outputs(cached), held(model, (0, 0, 0, 0, 0, 0))
    times = [float(inputs(step)[1][0]) for step in range(STEPS)]
    slope = (times[2] - times[1]) / (times[1] - times[0])
    want = kept[1] + slope * (kept[1] - kept[0])  # the head is affine, so a line stays a line
    torch.testing.assert_close(made[2], want, rtol=1e-4, atol=1e-5)


def test_the_schedule_is_that_of_a_whole_capture() -> None:
    model = OneStream(depth=4).eval()
    settings = bw.CacheConfig(num_steps=12, threshold=0.2, reuse_interval=2, indicator_tokens="all")
    whole, opaque = bw.transform(model, settings), bw.transform(model, settings, capture="opaque")
    with torch.no_grad():
        for step in range(12):
            x, t = noise("x", step, 2, 6, 4), torch.full((2,), 1 - step / 16)
            assert torch.equal(whole(x, t), opaque(x, t)), step
    assert computed(opaque) == computed(whole)
    assert False in computed(opaque)
    mine, theirs = (cached.report().contexts["default"].steps[1].change for cached in (opaque, whole))
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)


def test_attributes_that_the_forward_sets_are_the_models() -> None:
    model = Resisting().eval()
    cached = bw.transform(model, STATIC, capture="opaque")
    outputs(cached)
    assert cached.calls == model.calls == STEPS + 1  # the first call runs the model once more, to find its blocks
    assert computed(cached) == [not reused for reused in MASK], "a counter is no other model"
    assert all(type(block) is HostBlock for block in model.blocks)


def test_contexts_and_runs_that_were_broken_off() -> None:
    check_contexts(bw.transform(Resisting().eval(), STATIC, capture="opaque"))


def test_another_size_other_weights_and_other_modules() -> None:
    model = Resisting().eval()
    cached = bw.transform(model, num_steps=STEPS, threshold=1e9, warmup_steps=0, policy="adaptive", capture="opaque")
    with torch.no_grad():
        for batch in (2, 3, 2, 5):
            assert torch.equal(cached(*inputs(0, batch)), model(*inputs(0, batch)))
        for change in (
            lambda: model.blocks[1].up.weight.mul_(2),
            lambda: model.blocks.__setitem__(1, HostBlock(8).eval()),
            lambda: model.blocks.append(HostBlock(8).eval()),
        ):
            cached.reset()
            for step in range(3):
                cached(*inputs(step))
            assert computed(cached) == [True, True, False]
            change()
            assert torch.equal(cached(*inputs(3)), model(*inputs(3)))
            assert "before step 3: the cache was cleared" in cached.report().warnings[-1]
    assert cached.cached_blocks == tuple(f"blocks.{i}" for i in range(4))


def test_blocks_that_are_left_out_at_some_steps() -> None:
    model = Thinning().eval()
    cached = bw.transform(model, STATIC, capture="opaque")
    with pytest.warns(
        bw.CacheWarning, match=r"Thinning: blocks\.1 is not called, which the last computed step called, so step 4 was computed"
    ):
        made = outputs(cached)
    want = outputs(model)
    assert torch.equal(made[4], want[4])
    assert computed(cached) == [True, True, False, True, True, False]


def test_the_time_as_a_number() -> None:
    model = Plain().eval()
    check_time_as_a_number(bw.transform(model, policy="static", steps_mask=MASK, capture="opaque"), model)


def test_under_inference_mode() -> None:
    model = Resisting().eval()
    cached = bw.transform(model, STATIC, capture="opaque")
    with torch.inference_mode():
        assert same([cached(*inputs(step)) for step in range(STEPS)], held(model))


def test_blocks_are_compiled() -> None:
    model = OneStream().eval()
    cached = bw.transform(model, STATIC, capture="opaque")
    want = outputs(cached)
    counter = CompileCounter()
    cached.compile(backend=counter, fullgraph=True)
    for got, expected in zip(outputs(cached), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1, "equal blocks are compiled once"


def test_a_copy_finds_its_own_blocks() -> None:
    cached = bw.transform(Resisting().eval(), STATIC, capture="opaque", example_args=inputs(0))
    want = outputs(cached)
    for other in (copy.deepcopy(cached), pickle.loads(pickle.dumps(cached))):
        assert same(outputs(other), want)
        assert other.original is not cached.original


def test_settings_change_and_callbacks_are_told() -> None:
    cached = bw.transform(Resisting().eval(), STATIC, capture="opaque")
    assert repr(cached) == "OpaqueModel(Resisting, policy='static', reuse='output', no blocks found yet)"
    told: list[bw.StepEvent] = []
    handle = cached.on_step(told.append)
    outputs(cached)
    assert [event.computed for event in told] == [not reused for reused in MASK]
    handle.remove()
    cached.configure(steps_mask=(0, 1, 1, 1, 1, 0))
    outputs(cached)
    assert computed(cached) == [True, False, False, False, False, True]
    assert repr(cached).startswith("OpaqueModel(Resisting, policy='static', reuse='output', 3 blocks cached: ")


def test_memory_is_one_output_a_block_and_freed_at_the_end() -> None:
    cached = bw.transform(Resisting(depth=5).eval(), STATIC, capture="opaque")
    outputs(cached, 3)
    size = 2 * 6 * 8 * 4  # batch, tokens, width, bytes
    assert 5 * size <= cached.report().contexts["default"].state_bytes < 6 * size
    outputs(cached)
    assert cached._contexts.get("default").state is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reuse": "residual"}, r"reuse='residual' needs the graph.*Use reuse='output', 'taylor' or 'linear'"),
        ({"compute_first": 1}, "leave out compute_first and compute_last"),
        ({"granularity": "block", "reuse": "residual"}, "requires guard='graph'"),
        ({"calibrated_for": "Resisting"}, r"calibrated with cut='blocks' on the graph of a model.*Calibrate with cut='output'\."),
    ],
)
def test_settings_that_need_a_graph_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(bw.ConfigError, match=said):
        bw.transform(Resisting().eval(), num_steps=STEPS, capture="opaque", **settings)


def test_what_it_does_not_do_is_refused(tmp_path: Path) -> None:
    cached = bw.transform(Resisting().eval(), STATIC, capture="opaque", example_args=inputs(0))
    with pytest.raises(bw.ConfigError, match="captured as opaque: there is no graph"):
        bw.export(cached, tmp_path / "bundle")
    with pytest.raises(bw.ConfigError, match=r"cut='blocks' requires a model that is captured whole, and OpaqueModel\(.* is not"):
        bw.calibrate(cached, lambda model: None, cut="blocks", progress=False)
    with pytest.raises(bw.StateError, match="already transformed"):
        bw.transform(cached)
    with pytest.raises(bw.StateError, match=r"Call cached\.compile\(\) instead, which compiles each block"):
        torch.compile(cached)(*inputs(0))
    with pytest.raises(bw.StateError, match=r"is in training mode; call \.eval\(\) first"):
        cached.train()(*inputs(0))


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (Writing, bw.UnsupportedGraphError, r"blocks\.0 writes in place to a tensor of shape \[2, 6, 8\] that it is given"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), bw.CaptureError, r"Sequential has no blocks.*Hold the blocks in a torch\.nn\.ModuleList"),
    ],
)
def test_what_cannot_be_guarded_is_refused(make: Callable[[], nn.Module], error: type[Exception], said: str) -> None:
    model = make().eval()
    cached = bw.transform(model, COMPUTE, capture="opaque")
    args = inputs(0)[: 1 if isinstance(model, nn.Sequential) else 2]
    with pytest.raises(error, match=said), torch.no_grad():
        cached(*args)


def test_what_a_block_returned_outlives_the_replay_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks replay CUDA graphs over the same memory, and the model hands the output of one to the next."""
    pool: list[Tensor] = []

    def replaying(block: nn.Module, **options: Any) -> Callable[..., Any]:
        def call(*args: Any) -> Tensor:
            for tensor in pool:
                tensor.data.fill_(torch.nan)  # as a replay does, which no version counts
            pool.append(block(*args))
            return pool[-1]

        return call

    model = Resisting().eval()
    expected = outputs(bw.transform(model, STATIC, capture="opaque"))
    monkeypatch.setattr(torch, "compile", replaying)
    for options, alike in (({"mode": "reduce-overhead"}, True), ({}, False)):
        cached = bw.transform(model, STATIC, capture="opaque")
        cached.compile(**options)
        if alike:
            assert same(outputs(cached), expected)
        else:
            for _ in range(2):  # a second attempt is compared, too
                with pytest.raises(bw.CaptureError, match="returns something else than by itself"):
                    outputs(cached)
