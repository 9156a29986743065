"""Dynamic sizes: one program for many sizes on real model classes, and a program of its own where a size cannot be opened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import bwcache_compile as bw
from bwcache_compile import passes
from bwcache_compile.capture.capture import capture
from bwcache_compile.runtime import Toolchain
from tests.reference import Oracle
from tests.zoo import ZOO, noise
from tests.zoo.selection import selected


class Size(NamedTuple):
    """Latent batch, frames, height and width, and tokens of text."""

    batch: int
    frames: int
    height: int
    width: int
    text: int


FIRST = Size(2, 3, 8, 6, 5)
OTHERS = (Size(2, 3, 8, 6, 9), Size(2, 5, 8, 6, 5), Size(2, 3, 12, 6, 5), Size(3, 2, 6, 10, 4), Size(4, 4, 8, 8, 7))


def time(step: int, size: Size, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((size.batch,), 900 - 40 * step, dtype=dtype)


def grid(size: Size) -> Tensor:
    return torch.cartesian_prod(torch.zeros(1), torch.arange(float(size.height)), torch.arange(float(size.width)))


INPUTS: dict[str, Callable[[int, Size], dict[str, Any]]] = {
    "wan": lambda s, z: {
        "hidden_states": noise("x", s, z.batch, 4, z.frames, z.height, z.width),
        "timestep": time(s, z),
        "encoder_hidden_states": noise("text", 0, z.batch, z.text, 16),
    },
    "hunyuan_video": lambda s, z: {
        "hidden_states": noise("x", s, z.batch, 4, z.frames, z.height, z.width),
        "timestep": time(s, z, torch.int64),
        "encoder_hidden_states": noise("text", 0, z.batch, z.text, 16),
        "encoder_attention_mask": torch.ones(z.batch, z.text, dtype=torch.int64),
        "pooled_projections": noise("pooled", 0, z.batch, 8),
        "guidance": torch.full((z.batch,), 6000.0),
    },
    "cogvideox15": lambda s, z: {
        "hidden_states": noise("x", s, z.batch, 2 * z.frames, 4, z.height, z.width),
        "encoder_hidden_states": noise("text", 0, z.batch, z.text, 8),
        "timestep": time(s, z, torch.int64),
        "image_rotary_emb": tuple(noise(n, 0, z.frames * z.height * z.width // 4, 16) for n in ("cos", "sin")),
    },
    "ltx": lambda s, z: {
        "hidden_states": noise("x", s, z.batch, z.frames * z.height * z.width, 8),
        "encoder_hidden_states": noise("text", 0, z.batch, z.text, 16),
        "timestep": time(s, z),
        "encoder_attention_mask": torch.ones(z.batch, z.text, dtype=torch.int64),
        "num_frames": z.frames,
        "height": z.height,
        "width": z.width,
    },
    "flux": lambda s, z: {
        "hidden_states": noise("x", s, z.batch, z.height * z.width, 4),
        "encoder_hidden_states": noise("text", 0, z.batch, z.text, 16),
        "pooled_projections": noise("pooled", 0, z.batch, 8),
        "timestep": time(s, z) / 1000,
        "img_ids": grid(z),
        "txt_ids": torch.zeros(z.text, 3),
        "guidance": torch.full((z.batch,), 3.5),
    },
}


@pytest.fixture(scope="module", params=selected(INPUTS, always={"wan"}))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str) -> nn.Module:
    return ZOO[name].make()


@pytest.fixture(scope="module")
def transform(name: str, model: nn.Module) -> Callable[[bw.CacheConfig], bw.CachedModel]:
    """`bw.transform` with one capture for all settings, at the first size with all sizes open."""
    captured = capture(model, (), dict(sorted(INPUTS[name](0, FIRST).items())), "auto")
    toolchain = Toolchain(capture=lambda *_, **__: captured.fresh(), build=passes.build, explain=passes.explain)
    return lambda config: bw.CachedModel(model, config, toolchain, "auto")


def run(module: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return module(**inputs).sample


def test_captured_at_one_size_and_run_at_five_others(name: str, model: nn.Module, transform: Any) -> None:
    cached = transform(bw.CacheConfig(threshold=0, num_steps=2))
    for size in (FIRST, *OTHERS, FIRST):
        for step in range(2):
            inputs = INPUTS[name](step, size)
            assert torch.equal(run(cached, inputs), run(model, inputs)), f"{size}, step {step}"
        assert (cached.report().captures, len(cached._programs)) == (1, 1), size


@pytest.mark.parametrize("reuse", ["output", "residual", "taylor"])
def test_forced_reuse_is_the_oracle_at_two_sizes(name: str, model: nn.Module, transform: Any, reuse: Any) -> None:
    entry = ZOO[name]
    config = bw.CacheConfig(policy="static", steps_mask=(0, 1, 0, 1, 1), reuse=reuse)
    cached = transform(config)
    for size in (FIRST, OTHERS[3]):
        oracle = Oracle(model, [b for stack in entry.stacks for b in getattr(model, stack)], entry.streams, config)
        for step in range(5):
            inputs = INPUTS[name](step, size)
            actual = run(cached, inputs)
            clock = cached.plan.time_input
            expected = oracle(now=None if clock is None else float(inputs[clock][0]), **inputs).sample
            # the same operators on the same numbers, but residual sums may be taken in another layout
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert cached.report().captures == 1


def test_the_schedule_decides_like_the_oracle_at_another_size(name: str, model: nn.Module, transform: Any) -> None:
    entry = ZOO[name]
    config = bw.CacheConfig.paper(num_steps=10, threshold=0.5, reuse_interval=2, warmup_steps=2)
    cached = transform(config)
    run(cached, INPUTS[name](0, FIRST))
    oracle = Oracle(model, [b for stack in entry.stacks for b in getattr(model, stack)], entry.streams, config)
    for step in range(10):
        inputs = INPUTS[name](step, OTHERS[4])
        torch.testing.assert_close(run(cached, inputs), oracle(**inputs).sample, rtol=1e-5, atol=1e-6)
        record = cached.report().contexts["default"].steps[-1]
        assert record.computed != oracle.reused
        if record.indicator is not None:
            assert record.indicator == pytest.approx(oracle.indicators[step], rel=1e-4)
    assert cached.report().contexts["default"].reused > 0
