"""Low-rank adapters by diffusers' own loaders and peft: after each change a run is a fresh pipeline's, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bwcache_compile as bw
from tests.pipelines.cases import CASES, STEPS, Case

CONFIG = bw.CacheConfig(num_steps=STEPS, threshold=float("inf"), reuse_interval=1, tail=0.0)
LENGTH = 6


def lora(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Draw an adapter of rank 2 for every query and value projection, under the names that diffusers' loaders take."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in ("to_q", "to_v"):
            state[f"transformer.{name}.lora_A.weight"] = torch.randn(2, module.in_features, generator=generator) * 0.3
            state[f"transformer.{name}.lora_B.weight"] = torch.randn(module.out_features, 2, generator=generator) * 0.3
    assert state
    return state


@dataclasses.dataclass
class Side:
    """A pipeline around a cached transformer, and the model in it."""

    case: Case
    model: nn.Module
    pipe: Any
    cached: bw.CachedModel

    def run(self, **more: Any) -> Tensor:
        return self.case.run(self.pipe, self.case.widths[0], LENGTH, **more)

    def check(self, expected: Tensor | None = None, **more: Any) -> Tensor:
        """Run, and compare with a fresh transform, or what one gave; at threshold 0, with the uncached pipeline."""
        width = self.case.widths[0]
        result = self.run(**more)
        if expected is None:
            expected = self.case.run(self.case.pipeline(bw.transform(self.model, CONFIG)), width, LENGTH, **more)
        assert torch.equal(result, expected)
        eager = self.case.run(self.case.pipeline(self.model), width, LENGTH, **more)
        assert not torch.equal(result, eager), "nothing was reused"
        self.cached.configure(threshold=0)
        assert torch.equal(self.run(**more), eager)
        self.cached.configure(threshold=float("inf"))
        return result


def side(name: str) -> Side:
    case = CASES[name]
    model = case.model()
    pipe = case.pipeline(model)
    cached = pipe.transformer = bw.transform(model, CONFIG)
    return Side(case, model, pipe, cached)


@pytest.mark.zoo
@pytest.mark.parametrize("name", [n for n in CASES if n != "latte"])  # its pipeline has no loader
def test_adapters_come_and_go(name: str) -> None:
    s = side(name)
    plain = s.run()
    s.pipe.load_lora_weights(lora(s.model), adapter_name="style")
    s.pipe.set_adapters("style", 0.5)
    loaded = s.check()
    assert not torch.allclose(loaded, plain, atol=1e-3), "the adapter has no say"
    s.pipe.fuse_lora()
    torch.testing.assert_close(s.check(), loaded, rtol=1e-3, atol=1e-3)  # the same sum in another order
    s.pipe.unfuse_lora()
    s.pipe.unload_lora_weights()
    assert not any("lora" in name for name, _ in s.model.named_modules())
    torch.testing.assert_close(s.run(), plain, rtol=1e-3, atol=1e-3)  # fusing and taking out again rounds the weights
    assert s.cached.report().captures == 4


@pytest.mark.zoo
def test_each_change_of_several_adapters() -> None:
    s = side("wan")
    plain, first, second = s.run(), lora(s.model), lora(s.model, seed=1)
    changes: list[tuple[Callable[[], Any], int | None]] = [  # and the state that it comes back to, if any
        (lambda: s.pipe.load_lora_weights(first, adapter_name="first"), None),
        (lambda: s.pipe.load_lora_weights(second, adapter_name="second"), None),
        (lambda: s.pipe.set_adapters(["first", "second"], [0.5, 0.25]), None),
        (s.cached.disable_lora, 0),
        (s.cached.enable_lora, 3),
        (lambda: s.pipe.delete_adapters("first"), None),
        (s.pipe.unload_lora_weights, 0),
    ]
    results = [plain]
    for change, back_to in changes:
        change()
        results.append(s.check(None if back_to is None else results[back_to]))
        assert not torch.equal(results[-1], results[-2])
    assert s.cached.report().captures == 1 + len(changes)


@pytest.mark.zoo
def test_a_scale_at_the_call_and_an_adapter_that_is_added_to_the_transformer() -> None:
    from peft import LoraConfig

    s = side("wan")
    s.cached.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=["to_q"], init_lora_weights=False), "drawn")
    s.cached.set_adapters("drawn", 0.2)
    strong = s.check()
    weak = s.check(attention_kwargs={"scale": 0.45})  # the forward multiplies each layer's number by it, and divides it again
    assert not torch.equal(strong, weak)
    s.cached.set_adapters("drawn", 0.7)
    assert not torch.equal(s.check(attention_kwargs={"scale": 0.45}), weak), "a number that was scaled is watched still"


@pytest.mark.zoo
def test_a_weight_that_is_set_between_two_steps() -> None:
    s = side("wan")
    s.pipe.load_lora_weights(lora(s.model), adapter_name="style")

    def fade(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step in (0, 3):
            pipe.set_adapters("style", 0.1 if step == 0 else 1.0)
        return tensors

    s.pipe.set_adapters("style", 1.0)
    result = s.run(callback_on_step_end=fade)
    context = s.cached.report().contexts["cond"]
    assert [step.computed for step in context.steps] == [True, True, True, False], "what was cached came from another model"
    assert len(context.events) == 1
    fresh = s.case.pipeline(bw.transform(s.model, CONFIG))
    assert torch.equal(s.case.run(fresh, s.case.widths[0], LENGTH, callback_on_step_end=fade), result)
