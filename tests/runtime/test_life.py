"""A cached model through what happens to models: casts, moves, copies, other kernels, hooks, edits between two steps."""

from __future__ import annotations

import contextlib
import copy
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bwcache_compile as bw
from bwcache_compile.runtime import programs
from tests.models import OneStream
from tests.runtime.helpers import run
from tests.zoo import ZOO

COMPUTE = bw.CacheConfig(num_steps=8, threshold=0)
REUSE = bw.CacheConfig(policy="static", steps_mask=(0, 1, 1, 1, 1, 1, 1, 1))


@pytest.fixture(scope="module")
def wan() -> nn.Module:
    return ZOO["wan"].make()


@torch.no_grad()
def sample(module: nn.Module, step: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    inputs = ZOO["wan"].inputs(step)
    return module(**{name: value if name == "timestep" else value.to(dtype) for name, value in inputs.items()}).sample


def events(cached: bw.CachedModel) -> list[str]:
    return [event for context in cached.report().contexts.values() for event in context.events]


# -- numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_model_bit_for_bit(dtype: torch.dtype) -> None:
    model = ZOO["wan"].make().to(dtype)
    cached = bw.transform(model, COMPUTE)
    for step in range(2):
        expected = sample(model, step, dtype)
        assert expected.dtype == dtype
        assert torch.equal(sample(cached, step, dtype), expected)


def test_autocast_goes_on_and_off(model: OneStream) -> None:
    cached = bw.transform(model, COMPUTE)
    for step, enabled in enumerate((False, True, False, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            inputs = model.example(step=step)
            expected = run(model, *inputs)
            assert expected.dtype == (torch.bfloat16 if enabled else torch.float32)
            assert torch.equal(run(cached, *inputs), expected)
    assert cached.report().captures == 2


def test_gradients_and_inference_mode(model: OneStream) -> None:
    model.requires_grad_(True)
    cached = bw.transform(model, COMPUTE)
    with torch.inference_mode():
        assert torch.equal(cached(*model.example()), model(*model.example()))
    output = cached(*model.example(step=1))  # gradients are on
    assert not output.requires_grad
    assert torch.equal(output, model(*model.example(step=1)))
    assert cached.report().contexts["default"].computed == 2


@pytest.mark.parametrize("reuse", [False, True])
def test_pytorchs_attention_switch_is_read_when_the_graph_runs(wan: nn.Module, reuse: bool) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    cached = bw.transform(wan, COMPUTE)
    sample(cached)
    with sdpa_kernel(SDPBackend.MATH) if reuse else contextlib.nullcontext():
        assert torch.equal(sample(cached, 1), sample(wan, 1))
    assert cached.report().captures == 1


@pytest.mark.zoo
def test_diffusers_attention_back_end_is_part_of_the_signature(wan: nn.Module) -> None:
    from diffusers import attention_backend

    cached = bw.transform(wan, COMPUTE)
    sample(cached)
    with attention_backend("native"):
        assert torch.equal(sample(cached, 1), sample(wan, 1))
    assert cached.report().captures == 1
    with attention_backend("_native_math"), pytest.raises(bw.CaptureError) as caught:
        sample(cached, 2)
    assert re.sub(r"\d\.\d+e-\d+", "N", str(caught.value)) == (
        "could not capture WanTransformer3DModel as one graph.\n  non-strict: the outputs of the captured graph differ from "
        "the model's: output 0 differs by up to N\n  strict: the outputs of the captured graph differ from the model's: "
        "output 0 differs by up to N\n  If the outputs differ by a rounding error, the model selects kernels itself (with "
        "sdpa_kernel, for example), which a graph cannot record: select them around the call, or transform with "
        'verify="close". If they differ by more, torch.export traced the model wrongly: try a size that the model was built '
        "for."
    )
    assert torch.equal(sample(cached, 2), sample(wan, 2)), "back to the default, nothing is lost"
    assert cached.report().captures == 1


# -- the drop-in's methods ---------------------------------------------------------------------------------------


@pytest.mark.zoo
def test_methods_that_change_the_model_are_noticed() -> None:
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    class Louder(WanAttnProcessor):
        def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Tensor:
            return 2 * super().__call__(attn, *args, **kwargs)

    model = ZOO["wan"].make()
    cached = bw.transform(model, REUSE)
    changes: list[Callable[[], Any]] = [
        lambda: cached.set_attention_backend("native"),
        lambda: cached.reset_attention_backend(),
        lambda: cached.set_attn_processor(Louder()),
        lambda: model.blocks[0].attn1.set_processor(WanAttnProcessor()),  # past the wrapper
    ]
    sample(cached)
    for step, change in enumerate(changes, start=1):
        change()
        assert torch.equal(sample(cached, step), sample(model, step)), "a reused step would hold what was cached before"
        assert cached.report().captures == 1 + step
    assert "processor" in events(cached)[-1]
    assert [record.step for record in cached.report().contexts["default"].steps] == [0, 1, 2, 3, 4], "the step goes on"


@pytest.mark.zoo
def test_fused_projections() -> None:
    model = ZOO["flux"].make()
    cached = bw.transform(model, COMPUTE)
    for step, change in enumerate((lambda: None, cached.fuse_qkv_projections, cached.unfuse_qkv_projections)):
        change()
        inputs = ZOO["flux"].inputs(step)
        with torch.no_grad():
            assert torch.equal(cached(**inputs).sample, model(**inputs).sample)


def test_edits_through_a_method_clear_the_cache(model: OneStream) -> None:
    def fuse_lora() -> None:
        model.head.weight.data += 1  # moves neither version nor address

    model.fuse_lora = fuse_lora  # type: ignore[assignment]
    type(model).fuse_weights = lambda self: fuse_lora()  # type: ignore[attr-defined]
    cached = bw.transform(model, REUSE)
    run(cached, *model.example())
    cached.fuse_weights()
    assert torch.equal(run(cached, *model.example(step=1)), run(model, *model.example(step=1)))
    assert events(cached) == ["the weights changed before step 1: the cache was cleared"]
    del type(model).fuse_weights  # type: ignore[attr-defined]


def test_save_and_load(tmp_path: Path) -> None:
    model = ZOO["ltx"].make()
    cached = bw.transform(model, COMPUTE)
    cached.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, low_cpu_mem_usage=False).eval()
    assert type(loaded) is type(model)
    inputs = ZOO["ltx"].inputs(0)
    with torch.no_grad():
        assert torch.equal(bw.transform(loaded, COMPUTE)(**inputs).sample, loaded(**inputs).sample)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_it_passes_for_the_original(model: OneStream) -> None:
    cached = bw.transform(model, COMPUTE)
    assert isinstance(cached, OneStream)
    assert issubclass(cached.__class__, OneStream)
    assert isinstance(cached, bw.CachedModel)
    assert cached.get_submodule("blocks.0") is cached.blocks[0] is model.blocks[0]
    cached.knob = 3
    assert model.knob == 3, "the original's forward reads its attributes, not the wrapper's"
    del cached.knob
    assert not hasattr(model, "knob")
    assert not hasattr(cached, "knob")


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda cached: pickle.loads(pickle.dumps(cached))])
def test_a_copy_starts_without_state(model: OneStream, copied: Callable[[bw.CachedModel], bw.CachedModel]) -> None:
    cached = bw.transform(model, REUSE)
    run(cached, *model.example())
    other = copied(cached)
    assert isinstance(other, bw.CachedModel)
    assert other.cache_config == REUSE
    assert (other.head.weight is model.head.weight) == (copied is copy.copy)
    assert other.report().captures == 0
    assert torch.equal(run(other, *model.example(step=1)), run(model, *model.example(step=1)))
    assert [record.step for record in cached.report().contexts["default"].steps] == [0]


# -- edits between two steps -------------------------------------------------------------------------------------


def _cast(module: nn.Module) -> None:
    module.double()


def _assigned(module: nn.Module) -> None:
    module.load_state_dict({name: value.clone() for name, value in module.state_dict().items()}, assign=True)


def _readdressed(module: nn.Module) -> None:
    module.head.weight.data = module.head.weight.data * 2


def _hooked(module: nn.Module) -> None:
    module.get_submodule("blocks.0").register_forward_hook(lambda module, args, output: output * 2)


def _attribute(module: nn.Module) -> None:
    module.embed = lambda t: module.time(t.view(-1, 1, 1)) * 2


EDITS: list[tuple[Callable[[nn.Module], None], str, bool]] = [
    (_cast, "the modules changed (the weights' dtype or device)", True),
    (_assigned, "the modules changed (patch.weight)", True),
    (_hooked, "the modules changed (blocks.0)", True),
    (_attribute, "the modules changed (OneStream)", True),
    (_readdressed, "the weights changed", False),
]


@pytest.mark.parametrize("through_wrapper", [False, True])
@pytest.mark.parametrize(("edit", "event", "captured"), EDITS, ids=[edit.__name__ for edit, _, _ in EDITS])
def test_an_edit_between_two_steps(edit: Callable[[nn.Module], None], event: str, captured: bool, through_wrapper: bool) -> None:
    class Casting(OneStream):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return super().forward(x.to(self.head.weight.dtype), t.to(self.head.weight.dtype))

    model = Casting().eval()
    event = event.replace("OneStream", "Casting")
    cached = bw.transform(model, REUSE)
    run(cached, *model.example())
    edit(cached if through_wrapper else model)
    assert torch.equal(run(cached, *model.example(step=1)), run(model, *model.example(step=1)))
    assert events(cached) == [f"{event} before step 1: the cache was cleared"]
    assert cached.report().captures == 1 + captured
    assert run(cached, *model.example(step=2)) is not None
    assert "".join("#" if record.computed else "." for record in cached.report().contexts["default"].steps) == "##."


def test_setting_an_equal_value_changes_nothing(model: OneStream) -> None:
    model.note = [1, 2.5, "text"]  # type: ignore[assignment]
    cached = bw.transform(model, REUSE)
    run(cached, *model.example())
    model.note = [1, 2.5, "text"]  # type: ignore[assignment]
    run(cached, *model.example(step=1))
    assert cached.report().contexts["default"].reused == 1


def test_what_a_models_own_forward_keeps_is_no_change() -> None:
    class Keeps(OneStream):
        """Makes a table for each width it sees, as rotary embeddings do."""

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            self.table = torch.linspace(0, 1, x.shape[1]).view(1, -1, 1)
            return super().forward(x * self.table, t)

    model = Keeps().eval()
    cached = bw.transform(model, REUSE)
    for step in range(4):
        run(cached, *model.example(step=step))
        run(model, *model.example(step=step))
    assert cached.report().captures <= 2
    assert cached.report().contexts["default"].reused >= 2


def test_an_empty_registry_of_hooks_is_no_change() -> None:
    model = ZOO["wan"].make()
    cached = bw.transform(model, REUSE)
    sample(cached)
    cached._reset_stateful_cache()  # as pipelines do after a run
    assert hasattr(model, "_diffusers_hook")
    sample(cached, 1)
    with model.cache_context("eager"):  # as pipelines do in a run of the original
        sample(model)
    sample(cached, 2)
    assert cached.report().captures == 1
    assert cached.report().contexts["default"].reused == 2
    cached.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    with pytest.raises(bw.ConfigError, match="has a hook on its forward"):
        sample(cached, 3)


# -- many signatures ---------------------------------------------------------------------------------------------


class Scaled(OneStream):
    """Takes a Python number, which each graph has built in."""

    def forward(self, x: Tensor, t: Tensor, scale: float) -> Tensor:
        return super().forward(x * scale, t)


def test_programs_are_bounded_and_thrashing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "MAX_PROGRAMS", 2)
    model = Scaled().eval()
    cached = bw.transform(model, COMPUTE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scale in (1.0, 2.0, 1.0, 3.0, 1.0):  # 2.0 is the one used longest ago when 3.0 comes
            run(cached, *model.example(), scale)
            cached.reset()
    assert (len(cached._programs), cached.report().captures) == (2, 3)
    message = (
        "6 programs of Scaled have been captured, and each capture takes seconds. Something changes between calls: "
        "an input (a Python number that could be a tensor?), or the model's modules."
    )
    for scale in (4.0, 5.0):
        run(cached, *model.example(), scale)
        cached.reset()
    with pytest.warns(bw.CacheWarning, match=f"^{re.escape(message)}$"):
        output = run(cached, *model.example(), 6.0)
    assert torch.equal(output, run(model, *model.example(), 6.0))
    assert len(cached._programs) == 2
