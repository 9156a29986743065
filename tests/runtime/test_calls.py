"""How a cached model may be called: by position or by name, through methods of the model, and around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bwcache_compile as bw
from bwcache_compile.runtime.signature import Parameters
from tests.models import OneStream
from tests.runtime.helpers import STATIC, pattern, run


def test_arguments_by_position_and_by_name_are_one_call(model: OneStream) -> None:
    cached = bw.transform(model, STATIC)
    with torch.no_grad():
        for step in range(3):
            x, t = model.example(step=step)
            args, kwargs = [((x, t), {}), ((x,), {"t": t}), ((), {"t": t, "x": x})][step]
            cached(*args, **kwargs)
    assert (cached.report().captures, pattern(cached), cached.report().warnings) == (1, "#..", ())


class Guided(OneStream):
    """As DiT and SiT are sampled: with guidance inside a method that calls the model's forward."""

    def forward_with_cfg(self, x: Tensor, t: Tensor, scale: float) -> Tensor:
        half = x[: len(x) // 2]
        cond, uncond = self.forward(torch.cat([half, half]), t).chunk(2)
        return torch.cat([uncond + scale * (cond - uncond)] * 2)

    @torch.no_grad()
    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        return self(x, t) + 1

    def describe(self) -> int:
        return len(self.blocks)


@pytest.mark.parametrize("method", ["forward_with_cfg", "denoise"])
def test_methods_that_call_forward_are_cached(method: str) -> None:
    model = Guided().eval()
    cached = bw.transform(model, STATIC)
    more = (1.5,) if method == "forward_with_cfg" else ()
    with torch.no_grad():
        for step in range(4):
            x, t = model.example(batch=2, step=step)
            expected, actual = getattr(model, method)(x, t, *more), getattr(cached, method)(x, t, *more)
            assert torch.equal(expected, actual) == (step in (0, 3))
    assert pattern(cached) == "#..#"
    assert cached.describe.__self__ is model, "other methods stay the original's"


def test_calls_that_go_around_the_cached_model_are_said(model: OneStream) -> None:
    cached = bw.transform(model, STATIC)
    with (
        pytest.warns(bw.CacheWarning, match=r"^the block `with cache_context\('cond'\)` ended without a call") as caught,
        cached.cache_context("cond"),
    ):
        model(*model.example())
    assert caught[0].filename == __file__
    with cached.cache_context("cond"):
        run(cached, *model.example())


def test_one_form_of_a_call() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Any, /, y: Any, z: Any = None, *more: Any, w: Any = None, **rest: Any) -> None: ...

    parameters = Parameters.of(Model())
    assert parameters.bind((1, 2), {"w": 3, "b": 5, "a": 4}) == ((1,), {"y": 2, "w": 3, "a": 4, "b": 5})
    assert list(parameters.bind((1,), {"b": 5, "w": 3, "y": 2, "a": 4})[1]) == ["y", "w", "a", "b"]
    assert parameters.bind((1, 2, 3, 4), {"w": 5}) == ((1, 2, 3, 4), {"w": 5}), "what follows is of *more"
    assert parameters.bind((1, 2), {"y": 3}) == ((1, 2), {"y": 3}), "given twice: forward says so"


class Numbered(OneStream):
    """Takes its time as a Python number or as a tensor, as models of diffusers do."""

    def forward(self, x: Tensor, t: Any) -> Tensor:
        time = t if isinstance(t, Tensor) else torch.tensor(t)
        return super().forward(x, time.reshape(1).to(x.dtype) / 8)


class OnlyNumbers(OneStream):
    """Branches on its time."""

    def forward(self, x: Tensor, t: Any) -> Tensor:
        return super().forward(x if t > 0.5 else -x, torch.ones(1))


@pytest.mark.parametrize("kind", [int, float])
def test_a_number_that_is_the_time_becomes_a_tensor(kind: type) -> None:
    model = Numbered().eval()
    cached = bw.transform(model, bw.CacheConfig(policy="static", steps_mask=(0, 1, 1, 0, 1, 0)))
    for _ in range(2):
        for step in range(6):
            x, _ = model.example(step=step)
            output = run(cached, x, kind(8 - step))
            if pattern(cached).endswith("#"):
                assert torch.equal(output, run(model, x, kind(8 - step)))
    assert pattern(cached) == "#..#.#"
    assert cached.report().captures == 3, "two with the number built in, before it was known to change, and one for all times"


def test_a_number_that_no_tensor_can_be_passed_for_is_refused() -> None:
    cached = bw.transform(OnlyNumbers().eval(), STATIC)
    x, _ = OneStream().example()
    for time in (0.9, 0.8):
        run(cached, x, time)
    for _ in range(2):
        with pytest.raises(bw.StateError) as caught:
            run(cached, x, 0.7)
        lines = str(caught.value).splitlines()
        assert lines[0].startswith(
            "`t` is a Python number that changes between calls (0.8, then 0.7). Python numbers are constants of a captured graph"
        )
        assert lines[-1] == "  If each call belongs to a different run, call cached.reset() between them."
