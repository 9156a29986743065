"""What running refuses, with the whole text: what failed, the evidence, what to do."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import bwcache_compile as bw
from tests.models import OneStream
from tests.zoo import ZOO

STATIC = bw.CacheConfig(policy="static", steps_mask=(0, 1, 1, 0, 1, 0))


@torch.no_grad()
def run(module: nn.Module, *inputs: Any, **named: Any) -> Any:
    return module(*inputs, **named)


def _closed(model: OneStream, use: Callable[[bw.CachedModel], Any]) -> None:
    cached = bw.transform(model, STATIC)
    cached.close()
    use(cached)


def _other_state(model: OneStream) -> None:
    cached = bw.transform(model, STATIC)
    cached.functional_step(model.example(batch=2), {}, cached.init_state(model.example()))


@dataclasses.dataclass
class Prediction:
    sample: torch.Tensor


class Wrapping(OneStream):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> Prediction:  # type: ignore[override]
        return Prediction(super().forward(x, t))


class NumberedSteps(OneStream):
    def forward(self, x: torch.Tensor, t: float) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x, torch.tensor([t], dtype=torch.float32))


def _shaping_setting(model: OneStream) -> None:
    bw.transform(model, STATIC).policy_parameters(reuse="residual", threshold=0.1)


REFUSALS: dict[str, tuple[Callable[[OneStream], Any], type[Exception], str]] = {
    "transformed": (
        lambda m: bw.transform(bw.transform(m)),
        bw.StateError,
        "this model is already transformed. Use it as it is, or transform the original model again with other settings.",
    ),
    "compiled": (
        lambda m: bw.transform(torch.compile(m)),
        bw.ConfigError,
        "this model is already compiled. Call transform on the original model, then torch.compile on the result.",
    ),
    "compiled in place": (
        lambda m: (m.compile(), bw.transform(m)),
        bw.ConfigError,
        "this model was compiled in place with model.compile(). Call transform on the model before it is compiled, then "
        "compile the result.",
    ),
    "no module": (
        lambda m: bw.transform(len),  # type: ignore[arg-type]
        bw.ConfigError,
        "transform expects a torch.nn.Module, got builtin_function_or_method.",
    ),
    "meta": (
        lambda m: bw.transform(OneStream().to("meta")),
        bw.ConfigError,
        "parameter patch.weight of OneStream is on the meta device: an offload hook moves its data in and out, and "
        'a captured graph would keep copies of it. Place the whole model on one device first, or call transform(model, capture="opaque").',
    ),
    "training": (
        lambda m: run(bw.transform(m.train(), STATIC), *m.example()),
        bw.StateError,
        "OneStream is in training mode; call .eval() first: caching is for inference.",
    ),
    "closed": (
        lambda m: _closed(m, lambda cached: run(cached, *m.example())),
        bw.StateError,
        "this cached model was closed; transform the model again.",
    ),
    "closed, by the functional form": (
        lambda m: _closed(m, lambda cached: cached.init_state(m.example())),
        bw.StateError,
        "this cached model was closed; transform the model again.",
    ),
    "not captured": (
        lambda m: bw.transform(m).plan,
        bw.StateError,
        "nothing is captured yet: call the model once, or pass example_args / example_kwargs to transform.",
    ),
    "input": (
        lambda m: run(bw.transform(m, STATIC), m.example(), object()),
        bw.ConfigError,
        "t: unsupported input type object; inputs are tensors, numbers, strings, None and containers of these. Pass "
        "the tensors that it holds, or register its class: torch.export.register_dataclass for a dataclass, else "
        "torch.utils._pytree.register_pytree_node.",
    ),
    "output": (
        lambda m: run(bw.transform(Wrapping().eval(), STATIC), *m.example()),
        bw.CaptureError,
        "Wrapping returns an object of type Prediction, but a graph can return only tensors, numbers, strings and None. Return the "
        "tensors that it holds, or register its class: torch.export.register_dataclass for a dataclass, else "
        "torch.utils._pytree.register_pytree_node.",
    ),
    "gradients": (
        lambda m: bw.transform(m, STATIC)(m.example()[0].requires_grad_(), m.example()[1]),
        bw.StateError,
        "an input requires gradients, which a reused step cannot provide. Call the model under torch.no_grad().",
    ),
    "no block left": (
        lambda m: bw.transform(m, bw.CacheConfig(num_steps=4, compute_first=2, compute_last=1), example_args=m.example()),
        bw.ConfigError,
        "compute_first=2 and compute_last=1 leave no block to cache: OneStream has 3 blocks.",
    ),
    "state": (
        _other_state,
        bw.StateError,
        "this state was made for inputs of other shapes or dtypes. Create a new one for these inputs with cached.init_state.",
    ),
    "configure": (
        _shaping_setting,
        bw.ConfigError,
        "the graphs depend on reuse, which cannot be changed now. Transform the model again, or export it again.\n  "
        "Can be changed: calibrated_for, calls_per_step, damping, decide, indicator_bounds, num_steps, order, reuse_fraction,"
        " reuse_interval, steps_mask, tail, threshold, timesteps, warmup_steps, weights.",
    ),
}


@pytest.mark.parametrize(("action", "kind", "message"), REFUSALS.values(), ids=list(REFUSALS))
def test_refusals(action: Callable[[OneStream], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        action(OneStream().eval())
    assert str(caught.value) == message


def test_a_number_may_change_between_runs() -> None:
    cached = bw.transform(NumberedSteps().eval(), STATIC)
    for time in (0.9, 0.9, 0.7, 0.7):
        run(cached, OneStream().example()[0], time)
    assert cached.report().contexts["default"].reused == 1


def _model_offload(model: Any) -> str:
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(model, execution_device="cpu")
    return "CpuOffload"


def _device_alignment(model: Any) -> str:
    from accelerate.hooks import attach_align_device_hook

    attach_align_device_hook(model, execution_device="cpu")
    return "AlignDevicesHook"


def _group_offload(model: Any) -> str:
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1)
    return "GroupOffloadingHook"


def _layerwise_casting(model: Any) -> str:
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    return "LayerwiseCastingHook"


def _another_cache(model: Any) -> str:
    from diffusers import FirstBlockCacheConfig

    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    return "FBCHeadBlockHook"


@pytest.mark.parametrize("hook", [_model_offload, _device_alignment, _group_offload, _layerwise_casting, _another_cache])
@pytest.mark.parametrize("early", [True, False], ids=["before the transform", "before the first call"])
def test_hooks_are_refused_at_any_time(hook: Callable[[Any], str], early: bool) -> None:
    model: Any = ZOO["wan"].make()
    if early:
        name = hook(model)
        with pytest.raises(bw.ConfigError) as caught:
            bw.transform(model)
    else:
        cached = bw.transform(model, STATIC)
        name = hook(cached)  # as a pipeline does: through the wrapper
        with pytest.raises(bw.ConfigError) as caught, torch.no_grad():
            cached(**ZOO["wan"].inputs(0))
    where, rest = str(caught.value).split(" of WanTransformer3DModel ")
    assert where in ("the top module", "module blocks.0", "module blocks.0.attn1.to_q")
    assert rest == (
        f"has a hook on its forward ({name}). Offloading, casting and other caches use such hooks; a captured graph would skip them"
        " or keep copies of the weights. Remove the hook first (for offloading: place the whole model on one device, or call"
        ' transform(model, capture="opaque")).'
    )


@pytest.mark.parametrize("early", [True, False], ids=["before the transform", "before the first call"])
def test_weights_that_are_kept_elsewhere_are_refused(early: bool) -> None:
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    model: Any = ZOO["wan"].make()
    whole = run(model, **ZOO["wan"].inputs(0)).sample
    cached = None if early else bw.transform(model, STATIC)
    cpu_offload(cached or model, execution_device=torch.device("cpu"))
    with pytest.raises(bw.ConfigError) as caught:
        run(cached or bw.transform(model, STATIC), **ZOO["wan"].inputs(0))
    assert re.sub("parameter [^ ]*", "parameter P", str(caught.value)) == (
        "parameter P of WanTransformer3DModel is on the meta device: an offload hook moves its data in and out, and "
        'a captured graph would keep copies of it. Place the whole model on one device first, or call transform(model, capture="opaque").'
    )
    remove_hook_from_submodules(cached or model)  # which puts the weights back
    assert torch.equal(run(cached or bw.transform(model, STATIC), **ZOO["wan"].inputs(0)).sample, whole)


def test_a_hook_added_between_two_steps_is_refused_until_it_is_gone() -> None:
    from accelerate import cpu_offload_with_hook
    from accelerate.hooks import remove_hook_from_module

    model = OneStream().eval()
    cached = bw.transform(model, STATIC)
    run(cached, *model.example())
    cpu_offload_with_hook(cached, execution_device="cpu")
    for _ in range(2):
        with pytest.raises(bw.ConfigError, match=r"^the top module of OneStream has a hook on its forward \(CpuOffload\)"):
            run(cached, *model.example(step=1))
    remove_hook_from_module(cached)
    assert not torch.equal(run(cached, *model.example(step=1)), run(model, *model.example(step=1)))
    assert [record.computed for record in cached.report().contexts["default"].steps] == [True, False]
