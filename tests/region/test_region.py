"""Models whose Python cannot be captured: their stacks are cached, and everything else runs as it is."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bwcache_compile as bw
from tests.models import Block, OneStream, TwoStream
from tests.uncaptured import COMPUTE, MASK, STATIC, STEPS, check_contexts, inputs, outputs, same
from tests.zoo.refused import REFUSED


class Branching(OneStream):
    """Branches on the value of the time and counts its calls."""

    calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        if t.mean().item() > 0.5:
            x = x * 1.01
        return super().forward(x, t)


class Skipping(OneStream):
    """Leaves its second block out when it is told to, as guidance that skips layers does."""

    def forward(self, x: Tensor, t: Tensor, skip: bool = False) -> Tensor:
        h, temb = self.patch(x), self.embed(t)
        if float(t.mean()) > 2:
            h = h + 1
        for place, block in enumerate(self.blocks):
            if not (skip and place == 1):
                h = block(h, temb)
        return self.head(h)


class Summing(OneStream):
    """Uses what its blocks return beside them."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, temb, total = self.patch(x), self.embed(t), 0.0
        for block in self.blocks:
            h = block(h, temb)
            total = total + h
        return self.head(total)


class PerBlock(OneStream):
    """Makes another time embedding for each block in between."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.patch(x)
        for place, block in enumerate(self.blocks):
            h = block(h, self.embed(t) * (1 + place))
        return self.head(h)


class Editing(OneStream):
    """Edits the stream in place between its blocks."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, temb = self.patch(x), self.embed(t)
        for block in self.blocks:
            h = block(h, temb)
            h.mul_(1.01)
        return self.head(h)


class Scale:
    """Holds a tensor, as cache objects do."""

    def __init__(self, value: float) -> None:
        self.value = torch.tensor(value)


class Holding(OneStream):
    """Hands an object to its blocks."""

    def __init__(self) -> None:
        class HoldingBlock(Block):
            def forward(self, x: Tensor, temb: Tensor, scale: Scale) -> Tensor:  # type: ignore[override]
                return super().forward(x, temb * scale.value)

        super().__init__()
        self.blocks = nn.ModuleList(HoldingBlock(8) for _ in range(3))
        self.scale = Scale(2.0)

    def forward(self, x: Tensor, t: Tensor, scale: Scale | None = None) -> Tensor:
        h, temb = self.patch(x), self.embed(t)
        for block in self.blocks:
            h = block(h, temb, scale or self.scale)
        return self.head(h)


def held(model: OneStream, reuse: str) -> list[Tensor]:
    """What a run on MASK returns, computed by hand."""
    made, kept = [], torch.zeros(0)
    for step, reused in enumerate(MASK):
        x, t = inputs(step)
        with torch.no_grad():
            x = x * 1.01 if t.mean() > 0.5 else x
            first, temb = model.patch(x), model.embed(t)
            if not reused:
                h = first
                for block in model.blocks:
                    h = block(h, temb)
                kept = h if reuse == "output" else h - first
                made.append(model.head(h))
            else:
                made.append(model.head(kept if reuse == "output" else first + kept))
    return made


@pytest.mark.parametrize("make", [Branching, TwoStream])
def test_threshold_zero_is_the_model_bit_for_bit(make: Callable[[], OneStream]) -> None:
    model = make().eval()
    cached = bw.transform(model, COMPUTE, capture="region")
    want = outputs(model)
    assert same(outputs(cached), want)
    assert same(outputs(cached), want), "another run"


@pytest.mark.parametrize("reuse", ["output", "residual"])
def test_a_reused_step_runs_the_models_own_python_on_what_the_blocks_returned_last(reuse: Any) -> None:
    model = Branching().eval()
    cached = bw.transform(model, STATIC, reuse=reuse, capture="region")
    made, want = outputs(cached), held(model, reuse)
    assert same(made[:2], want[:2])
    for got, expected in zip(made, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(made[5], outputs(model)[5], atol=1e-3), "reuse makes a difference"
    assert [record.computed for record in cached.report().contexts["default"].steps] == [not reused for reused in MASK]


def test_blocks_are_not_run_at_a_reused_step() -> None:
    model = Branching().eval()
    ran: list[int] = []
    cached = bw.transform(model, STATIC, capture="region")
    outputs(cached)
    model.head.register_forward_hook(lambda *_: ran.append(1))
    products = []
    for step in range(STEPS):
        with torch.profiler.profile() as profile:
            cached(*inputs(step))
        products.append(sum(event.count for event in profile.key_averages() if event.key in ("aten::addmm", "aten::mm")))
    assert len(ran) == STEPS
    assert [count == products[2] for count in products] == [bool(reused) for reused in MASK]
    assert products[0] > products[2] > 0


def test_attributes_that_the_forward_sets_are_the_models() -> None:
    model = Branching().eval()
    cached = bw.transform(model, STATIC, capture="region")
    outputs(cached)
    assert cached.calls == model.calls == STEPS + 1  # the first call runs the model once more, to find its stacks
    assert list(model.state_dict()) == list(OneStream().state_dict())
    assert all(type(block) is Block for block in model.blocks)


def test_every_stack_has_a_cache() -> None:
    model = TwoStream().eval()
    cached = bw.transform(model, STATIC, capture="region")
    outputs(cached)
    assert list(cached.stacks) == ["double_blocks.0", "single_blocks.0"]
    assert list(cached.report().contexts) == ["default (double_blocks.0)", "default (single_blocks.0)"]
    for context in cached.report().contexts.values():
        assert [record.computed for record in context.steps] == [not reused for reused in MASK]
    assert "double_blocks.0 .. double_blocks.1, single_blocks.0 .. single_blocks.1: " in repr(cached)


def test_contexts_and_runs_that_were_broken_off() -> None:
    check_contexts(bw.transform(Branching().eval(), STATIC, capture="region"))


def test_another_size_and_other_weights() -> None:
    model = Branching().eval()
    cached = bw.transform(model, COMPUTE, capture="region")
    for batch in (2, 3, 2, 5):
        with torch.no_grad():
            assert torch.equal(cached(*inputs(0, batch)), model(*inputs(0, batch)))
    with torch.no_grad():
        model.blocks[1].up.weight.mul_(2)
        assert torch.equal(cached(*inputs(1)), model(*inputs(1)))
        model.blocks[1] = Block(8).eval()
        assert torch.equal(cached(*inputs(2)), model(*inputs(2)))
        model.head = nn.Linear(8, 4).eval()
        assert torch.equal(cached(*inputs(3)), model(*inputs(3)))


def test_two_calls_a_step_without_context_names() -> None:
    model = TwoStream().eval()
    cached = bw.transform(model, STATIC, calls_per_step=2, capture="region")
    alone = {scale: [] for scale in (1.0, -0.5)}
    for scale, made in alone.items():
        single = bw.transform(model, STATIC, capture="region")
        for step in range(STEPS):
            x, c, t = model.example(2, step)
            with torch.no_grad():
                made.append(single(x * scale, c, t))
    for step in range(STEPS):
        for scale, made in alone.items():
            x, c, t = model.example(2, step)
            with torch.no_grad():
                assert torch.equal(cached(x * scale, c, t), made[step]), (scale, step)


def test_callbacks_are_told_of_each_stack() -> None:
    model = TwoStream().eval()
    cached = bw.transform(model, STATIC, capture="region")
    told: list[bw.StepEvent] = []
    handle = cached.on_step(told.append)
    outputs(cached)
    for name in cached.stacks:
        assert [event.computed for event in told if event.context == f"default ({name})"] == [not reused for reused in MASK]
    assert len(told) == 2 * STEPS
    handle.remove()
    outputs(cached)
    assert len(told) == 2 * STEPS


def test_blocks_that_are_left_out_later() -> None:
    model = Skipping(depth=8).eval()
    cached = bw.transform(model, STATIC, capture="region")
    outputs(cached, 3)
    said = (
        r"Skipping blocks\.2 is called with other arguments, or in another order\. Its stacks are looked for again: this step is computed"
    )
    with pytest.warns(bw.CacheWarning, match=said):
        made = cached(*inputs(3), skip=True)
    with torch.no_grad():
        assert torch.equal(made, model(*inputs(3), skip=True))
    assert repr(cached).startswith("RegionModel(Skipping, policy='static', reuse='output', blocks.0 .. blocks.7: ")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (Summing, r"Summing the model uses what blocks\.0 returns in aten\.add\.Tensor, and hands it not to the next block alone"),
        (PerBlock, r"blocks\.1 takes a tensor of shape \[2, 1, 8\] that neither blocks\.0 is given nor a block of the stack returned"),
        (Holding, r"blocks\.0 is given a Scale, and what it holds may be another thing at the next call"),
        (Editing, r"a tensor of shape \[2, 6, 8\] is edited in place before blocks\.1 takes it"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), r"Sequential has no stack of blocks"),
    ],
)
def test_what_is_no_stack_is_refused(make: Callable[[], nn.Module], said: str) -> None:
    model = make().eval()
    cached = bw.transform(model, COMPUTE, capture="region")
    args = inputs(0)[: 1 if isinstance(model, nn.Sequential) else 2]
    with pytest.raises(bw.CaptureError, match=said), torch.no_grad():
        cached(*args)


@pytest.mark.zoo
def test_a_model_that_no_exporter_captures() -> None:
    entry = REFUSED["cogvideox_other_size"]
    model = entry.make()
    cached = bw.transform(model, STATIC, capture="region")
    for step, reused in enumerate(MASK):
        with torch.no_grad():
            got, want = cached(**entry.inputs(step)).sample, model(**entry.inputs(step)).sample
        assert torch.equal(got, want) != bool(reused), step
    assert [record.computed for record in cached.report().contexts["default"].steps] == [not reused for reused in MASK]


def test_a_copy_finds_its_own_stacks() -> None:
    cached = bw.transform(Branching().eval(), STATIC, capture="region", example_args=inputs(0))
    want = outputs(cached)
    for other in (copy.deepcopy(cached), pickle.loads(pickle.dumps(cached))):
        assert same(outputs(other), want)
        assert other.original is not cached.original


def test_settings_change_at_run_time() -> None:
    cached = bw.transform(Branching().eval(), STATIC, capture="region", example_args=inputs(0))
    outputs(cached)
    cached.configure(steps_mask=(0, 1, 1, 1, 1, 0))
    outputs(cached)
    assert [record.computed for record in cached.report().contexts["default"].steps] == [True, False, False, False, False, True]


def test_a_stack_is_exported_alone(tmp_path: Path) -> None:
    cached = bw.transform(Branching().eval(), STATIC, capture="region", example_args=inputs(0))
    with pytest.raises(bw.ConfigError, match=r"captured by region\. Each of its stacks can be exported: export\(cached\.stacks\[name\]"):
        bw.export(cached, tmp_path / "bundle")
    manifest = bw.export(cached.stacks["blocks.0"], tmp_path / "bundle", format="pt2")
    assert manifest.self_check["largest_error"] == 0


@pytest.mark.parametrize(
    ("act", "error", "said"),
    [
        (lambda c: c.configure(calibrated_for="Branching"), bw.ConfigError, "calibrated with cut='blocks' on the graph of a model"),
        (lambda c: bw.transform(c), bw.StateError, "already transformed"),
        (lambda c: bw.calibrate(c, print, cut="blocks", progress=False), bw.ConfigError, r"captured whole, and RegionModel\(.* is not"),
        (lambda c: torch.compile(c)(*inputs(0)), bw.StateError, r"Call cached\.compile\(\) instead"),
        (lambda c: c.train()(*inputs(0)), bw.StateError, r"Branching is in training mode; call \.eval\(\) first"),
    ],
)  # fmt: skip
def test_what_it_does_not_do_is_refused(act: Callable[[Any], Any], error: type[Exception], said: str) -> None:
    cached = bw.transform(Branching().eval(), STATIC, capture="region", example_args=inputs(0))
    with pytest.raises(error, match=said):
        act(cached)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"capture": "parts"}, "capture must be one of 'whole', 'region', 'opaque', 'auto', got 'parts'"),
        ({"capture": "region", "blocks": ["blocks"]}, "leave out blocks, guard and dynamic_shapes"),
        ({"capture": "region", "guard": "graph"}, "leave out blocks, guard and dynamic_shapes"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], said: str) -> None:
    with pytest.raises(bw.ConfigError, match=said):
        bw.transform(Branching().eval(), COMPUTE, **options)


def test_nothing_was_called_yet() -> None:
    cached = bw.transform(Branching().eval(), COMPUTE, capture="region")
    with pytest.raises(bw.StateError, match="the stacks are found at the first call of the model"):
        cached.stacks["blocks.0"]
    assert repr(cached) == "RegionModel(Branching, policy='schedule', reuse='output', no stacks found yet)"
    assert cached.report().contexts == {}


def test_stacks_are_compiled() -> None:
    model = Branching().eval()
    cached = bw.transform(model, STATIC, capture="region", example_args=inputs(0))
    want = outputs(cached)
    cached.compile(backend="aot_eager", fullgraph=True)
    for got, expected in zip(outputs(cached), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
