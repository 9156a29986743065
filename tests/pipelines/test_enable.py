"""Caching enabled in pipelines: each run is right, whatever was done before, and the originals come back."""

from __future__ import annotations

import logging
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bwcache_compile as bw
from bwcache_compile.calibration import PlanEntry, Provenance
from tests.models import OneStream
from tests.pipelines.cases import CASES, STEPS, UNNAMED

SETTINGS: dict[str, Any] = {"policy": "schedule", "threshold": float("inf"), "reuse_interval": 1, "tail": 0.0}
"""The paper's schedule, which needs the number of steps: it is not said anywhere here."""
ALL = {**CASES, **UNNAMED}
QUICK = {("wan", torch.bfloat16), ("kandinsky5", torch.float32)}
NO_BFLOAT16 = {"kandinsky5": "its time embedding counts on the autocast of CUDA"}


class Gone(Exception):
    """What a server raises in a callback whose client is gone."""


def raising(after: int) -> Callable[..., dict[str, Any]]:
    """Return a callback that breaks a run off after some steps."""

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == after - 1:
            raise Gone
        return tensors

    return callback


def patterns(cached: bw.CachedModel) -> dict[str, str]:
    contexts = cached.report().contexts
    return {name: "".join("#" if step.computed else "." for step in context.steps) for name, context in contexts.items()}


def contexts_of(name: str) -> tuple[str, ...]:
    """Return the contexts of a pipeline: calls without a name are numbered, where the scheduler counts its steps."""
    return ("call_0",) if ALL[name].contexts == ("default",) and name != "latte" else ALL[name].contexts


def every_pipeline() -> list[Any]:
    return [
        pytest.param(name, dtype, marks=() if (name, dtype) in QUICK else pytest.mark.zoo)
        for name in ALL
        for dtype in (torch.float32, torch.bfloat16)
        if dtype is torch.float32 or name not in NO_BFLOAT16
    ]


@pytest.mark.filterwarnings("ignore:the graph of CosmosTransformer3DModel does not read the inputs 'padding_mask'")
@pytest.mark.parametrize(("name", "dtype"), every_pipeline())
def test_each_run_is_right_and_the_original_comes_back(name: str, dtype: torch.dtype) -> None:
    case = ALL[name]
    model = case.model().to(dtype)
    pipe, (width, _) = case.pipeline(model), case.widths
    written_down = dict(pipe.config)
    eager = case.run(pipe, width, 6)
    made = bw.enable(pipe, **SETTINGS)
    cached = made["transformer"]
    assert pipe.transformer is cached
    assert dict(pipe.config) == written_down
    assert cached.cache_config.decide == "joint"
    first = case.run(pipe, width, 6)
    assert patterns(cached) == dict.fromkeys(contexts_of(name), "##.#")
    assert not torch.equal(first, eager), "nothing was reused"
    captures = cached.report().captures
    assert torch.equal(case.run(pipe, width, 6), first), "a second run"
    for after in (1, 3):
        with pytest.raises(Gone):
            case.run(pipe, width, 6, callback_on_step_end=raising(after))
        assert torch.equal(case.run(pipe, width, 6), first), f"after a run that was broken off after {after} steps"
    assert cached.report().warnings == ()
    case.run(pipe, width, 6, num_inference_steps=7)
    assert patterns(cached) == dict.fromkeys(contexts_of(name), "##.#.#.")
    assert torch.equal(case.run(pipe, width, 6), first), "after a run of another number of steps"
    cached.configure(threshold=0)
    assert torch.equal(case.run(pipe, width, 6), eager)
    assert (cached.report().captures, cached.report().warnings) == (captures, ())
    bw.disable(pipe)
    assert pipe.transformer is model
    assert dict(pipe.config) == written_down
    assert torch.equal(case.run(pipe, width, 6), eager)


@pytest.mark.parametrize(
    ("name", "capture"),
    [
        ("wan", "region"),
        pytest.param("kandinsky5", "opaque", marks=pytest.mark.zoo),
        pytest.param("wan", "opaque", marks=pytest.mark.zoo),
        pytest.param("kandinsky5", "region", marks=pytest.mark.zoo),
        pytest.param("latte", "opaque", marks=pytest.mark.zoo),
        pytest.param("flux", "region", marks=pytest.mark.zoo),
    ],
)
def test_a_model_that_is_not_captured_whole_follows_the_run(name: str, capture: Any) -> None:
    case = ALL[name]
    model = case.model()
    pipe, (width, _) = case.pipeline(model), case.widths
    eager = case.run(pipe, width, 6)
    cached = bw.enable(pipe, capture=capture, decide="separate", **SETTINGS)["transformer"]
    first = case.run(pipe, width, 6)
    assert set(patterns(cached).values()) == {"##.#"}
    assert {context.partition(" (")[0] for context in patterns(cached)} == set(contexts_of(name))
    assert not torch.equal(first, eager), "nothing was reused"
    for after in (1, 3):
        with pytest.raises(Gone):
            case.run(pipe, width, 6, callback_on_step_end=raising(after))
        assert torch.equal(case.run(pipe, width, 6), first), f"after a run that was broken off after {after} steps"
    assert cached.report().warnings == ()
    case.run(pipe, width, 6, num_inference_steps=7)
    assert set(patterns(cached).values()) == {"##.#.#."}
    cached.configure(threshold=0)
    assert torch.equal(case.run(pipe, width, 6), eager)
    with pytest.raises(bw.StateError, match=r"^pipe\.transformer is cached already"):
        bw.enable(pipe)
    bw.disable(pipe)
    assert pipe.transformer is model


def experts() -> tuple[Any, nn.Module, nn.Module]:
    """Return a pipeline with two transformers, and these."""
    case = CASES["wan"]
    high, low = case.model(), case.model()
    low.load_state_dict({name: value * 1.2 for name, value in low.state_dict().items()})
    pipe = case.pipeline(high)
    pipe.register_modules(transformer_2=low)
    pipe.register_to_config(boundary_ratio=0.6)
    return pipe, high, low


@pytest.mark.zoo
def test_two_experts_have_settings_of_their_own() -> None:
    pipe, high, low = experts()

    def run(**more: Any) -> Tensor:
        return CASES["wan"].run(pipe, 32, 6, num_inference_steps=8, **more)

    eager = run()
    masks = {"transformer": (0, 0, 1, 0, 0, 0, 0, 0), "transformer_2": (0, 0, 0, 0, 1, 1, 0, 1)}
    bw.enable(pipe, {name: bw.CacheConfig(policy="static", steps_mask=mask) for name, mask in masks.items()})
    first = run()
    assert patterns(pipe.transformer) == {"cond": "##.", "uncond": "##."}
    assert patterns(pipe.transformer_2) == {"cond": "#..#.", "uncond": "#..#."}, "it follows the mask of the whole run"
    assert not torch.equal(first, eager)
    for after in (2, 5):
        with pytest.raises(Gone):
            run(callback_on_step_end=raising(after))
        assert torch.equal(run(), first)
    bw.disable(pipe)
    assert (pipe.transformer, pipe.transformer_2) == (high, low)
    assert torch.equal(run(), eager)
    bw.enable(pipe, **SETTINGS)
    run()
    assert patterns(pipe.transformer) == {"cond": "##.", "uncond": "##."}
    assert patterns(pipe.transformer_2) == {"cond": "##.#.", "uncond": "##.#."}


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["wan", "kandinsky5"])
def test_heuns_method_calls_twice_a_step_but_the_last(name: str) -> None:
    from diffusers import FlowMatchHeunDiscreteScheduler

    case = ALL[name]
    pipe, (width, _) = case.pipeline(case.model()), case.widths
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    eager = case.run(pipe, width, 6)
    cached = bw.enable(pipe, **SETTINGS)["transformer"]
    first = case.run(pipe, width, 6)
    assert patterns(cached) == dict.fromkeys(case.contexts, "##.#.#."), f"{STEPS} steps are 7 calls"
    assert not torch.equal(first, eager)
    with pytest.raises(Gone):
        case.run(pipe, width, 6, callback_on_step_end=raising(3))
    assert torch.equal(case.run(pipe, width, 6), first)
    assert cached.report().warnings == ()


@pytest.mark.zoo
def test_a_run_that_begins_behind_the_time_at_which_the_last_one_was_broken_off() -> None:
    case = CASES["flux"]
    pipe = case.pipeline(case.model())
    cached = bw.enable(pipe, **SETTINGS)["transformer"]
    late = {"sigmas": [0.4, 0.3, 0.2, 0.1]}
    alone = case.run(pipe, 32, 6, **late)
    with pytest.raises(Gone):
        case.run(pipe, 32, 6, callback_on_step_end=raising(2))
    assert torch.equal(case.run(pipe, 32, 6, **late), alone), "its time goes on, but it is another run"
    assert patterns(cached) == {"cond": "##.#", "uncond": "##.#"}


@pytest.mark.zoo
def test_another_scheduler_is_followed_from_the_next_run_on() -> None:
    from diffusers import UniPCMultistepScheduler

    case = CASES["wan"]
    pipe = case.pipeline(case.model())
    cached = bw.enable(pipe, **SETTINGS)["transformer"]
    first, euler = case.run(pipe, 32, 6), pipe.scheduler
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    case.run(pipe, 32, 6, num_inference_steps=6)
    assert patterns(cached) == {"cond": "##.#.#", "uncond": "##.#.#"}
    pipe.scheduler = euler
    assert torch.equal(case.run(pipe, 32, 6), first)


@pytest.mark.zoo
def test_a_compiled_transformer_is_followed_and_restored() -> None:
    case = CASES["wan"]
    model = case.model()
    pipe = case.pipeline(model)
    cached = bw.enable(pipe, **SETTINGS)["transformer"]
    first = case.run(pipe, 32, 6)
    pipe.transformer = torch.compile(cached, backend="eager")
    with bw.capture_call(pipe.transformer) as call:
        assert torch.allclose(case.run(pipe, 32, 6), first, atol=1e-5)
    assert "hidden_states" in call.kwargs
    assert patterns(cached) == {"cond": "##.#", "uncond": "##.#"}
    with pytest.raises(bw.StateError, match=r"^pipe\.transformer is cached already"):
        bw.enable(pipe)
    bw.disable(pipe)
    assert pipe.transformer is model


@pytest.mark.zoo
def test_a_cached_pipeline_is_saved_as_the_original_is(tmp_path: Path) -> None:
    pipe = CASES["wan"].pipeline(CASES["wan"].model())
    pipe.save_pretrained(tmp_path / "plain")
    bw.enable(pipe)
    pipe.save_pretrained(tmp_path / "cached")
    names = sorted(path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*.*"))
    assert len(names) >= 4
    assert all((tmp_path / "cached" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes() for name in names)


def test_one_line_says_what_was_done(caplog: pytest.LogCaptureFixture) -> None:
    pipe = Pipe({"transformer": OneStream().eval(), "transformer_2": OneStream().eval(), "vae": None})
    with caplog.at_level(logging.INFO, "bwcache_compile"):
        bw.enable(pipe)
        pipe.run(5)
        pipe.run(5)
        bw.disable(pipe)
    told = "policy='adaptive', reuse='taylor', decide='joint', guard='host'"
    assert [record.message for record in caplog.records if record.name == "bwcache_compile"] == [
        f"caching is enabled in Pipe: transformer (OneStream, {told}); transformer_2 (OneStream, {told})."
        " Blocks and steps are found at the first call.",
        f"transformer: 3 blocks are cached, 5 steps, {told}",
        "caching is disabled in Pipe: transformer, transformer_2",
    ]


class Pipe:
    """What a pipeline is at the least: named components, and a scheduler that says which times it runs."""

    def __init__(self, components: dict[str, Any]) -> None:
        self._names = list(components)
        for name, component in components.items():
            setattr(self, name, component)
        self.scheduler = types.SimpleNamespace(timesteps=None, step_index=None, begin_index=None)

    @property
    def components(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    @torch.no_grad()
    def run(self, steps: int) -> Tensor:
        self.scheduler.timesteps, self.scheduler.step_index = torch.linspace(1, 0.1, steps), None
        x = torch.ones(1, 6, 4)
        for i, time in enumerate(self.scheduler.timesteps):
            x = x - 0.1 * self.transformer(x, time[None])
            self.scheduler.step_index = i + 1
        return x


def refused(components: dict[str, Any], *given: Any, kind: type[Exception] = bw.ConfigError, **settings: Any) -> str:
    """Return why a pipeline of these components is refused; they must stay as they are."""
    pipe = Pipe(components)
    with pytest.raises(kind) as error:
        bw.enable(pipe, *given, **settings)
    assert all(getattr(pipe, name) is component for name, component in components.items())
    return str(error.value)


def test_a_pipeline_without_a_transformer_is_refused() -> None:
    assert refused({"vae": nn.Identity(), "text_encoder": nn.Identity(), "transformer": None}) == (
        "Pipe has no transformer to cache: its models are vae, text_encoder. If one of them is a diffusion transformer under another name,"
        " name it: enable(pipe, {name: settings})."
    )
    assert refused({"unet": nn.Identity()}).startswith(
        "Pipe has no transformer to cache: its denoiser `unet` is a U-Net, which is not supported; its models are unet."
    )
    with pytest.raises(
        bw.ConfigError,
        match=r"^expected a diffusers pipeline \(with `components`\), got Linear\. To cache a model by itself, call transform\.$",
    ):
        bw.enable(nn.Linear(1, 1))


def test_a_model_under_another_name_is_named() -> None:
    pipe = Pipe({"dit": OneStream().eval(), "transformer": OneStream().eval()})
    assert list(bw.enable(pipe, {"dit": {"threshold": 0.1}}, num_steps=5)) == ["dit"]
    assert (pipe.dit.cache_config.threshold, pipe.dit.cache_config.num_steps) == (0.1, 5)
    assert not isinstance(pipe.transformer, bw.CachedModel)
    message = refused({"dit": OneStream().eval()}, {"dit": None, "refiner": None})
    assert message.startswith("Pipe has no model 'refiner'; its models are dit. A dictionary holds either CacheConfig settings")


def test_nothing_is_enabled_where_the_second_transformer_fails() -> None:
    components = {"transformer": OneStream().eval(), "transformer_2": torch.compile(OneStream())}
    assert refused(components).startswith("pipe.transformer_2: this model is already compiled. Call transform on the original model")
    compiled = OneStream()
    compiled.compile()
    assert refused({**components, "transformer_2": compiled}).startswith("pipe.transformer_2: this model was compiled in place")
    other = bw.CacheConfig(policy="static", steps_mask=(0, 1), calibrated_for="Model, float32, weights 0")
    components["transformer_2"] = OneStream().eval()
    message = refused(components, {"transformer": None, "transformer_2": other}, kind=bw.StateError)
    assert message.startswith(
        "pipe.transformer_2: these settings were calibrated for Model, float32, weights 0, but the model is OneStream"
    )


def test_offload_hooks_are_refused_before_and_after() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    hooked = add_hook_to_module(OneStream().eval(), ModelHook())
    assert refused({"transformer": hooked}).startswith(
        "pipe.transformer: the top module of OneStream has a hook on its forward (ModelHook)."
    )
    model = OneStream().eval()
    pipe = Pipe({"transformer": model})
    bw.enable(pipe, **SETTINGS)
    add_hook_to_module(pipe.transformer, ModelHook())
    with pytest.raises(bw.ConfigError, match=r"^the top module of OneStream has a hook on its forward \(ModelHook\)"):
        pipe.run(3)
    with pytest.raises(bw.StateError, match=r"^a hook was put on pipe\.transformer since caching was enabled \(ModelHook\)"):
        bw.disable(pipe)
    remove_hook_from_module(pipe.transformer)
    pipe.run(3)
    bw.disable(pipe)
    assert pipe.transformer is model
    pipe.run(3)


def test_twice_is_refused_and_nothing_to_disable_too() -> None:
    pipe = Pipe({"transformer": OneStream().eval()})
    with pytest.raises(bw.StateError, match=r"^caching is not enabled in Pipe: none of its components is a cached model\.$"):
        bw.disable(pipe)
    (cached,) = bw.enable(pipe).values()
    with pytest.raises(
        bw.StateError, match=r"^pipe\.transformer is cached already\. Change its settings with pipe\.transformer\.configure"
    ):
        bw.enable(pipe, threshold=0.2)
    assert pipe.transformer is cached
    bw.disable(pipe)
    bw.enable(pipe)
    assert pipe.transformer is not cached


@pytest.mark.parametrize(
    ("given", "settings", "decide"),
    [
        (None, {}, "joint"),
        (None, {"num_steps": 4}, "joint"),
        ({"num_steps": 4}, {}, "joint"),
        ({"decide": "separate"}, {}, "separate"),
        (bw.CacheConfig(num_steps=4), {}, "separate"),
        (bw.CacheConfig(num_steps=4), {"decide": "joint"}, "joint"),
        (None, {"capture": "opaque"}, "joint"),
        (None, {"capture": "region"}, "joint"),
        (None, {"guard": "graph"}, "separate"),
        (None, {"guard": "graph", "granularity": "block", "reuse": "residual"}, "separate"),
    ],
)
def test_branches_decide_together_unless_it_is_said_otherwise(given: Any, settings: dict[str, Any], decide: str) -> None:
    (cached,) = bw.enable(Pipe({"transformer": OneStream().eval()}), given, **settings).values()
    assert cached.cache_config.decide == decide


def plan_of(*budgets: int) -> bw.CalibrationPlan:
    """Return a plan for four steps, with entries that compute so many of them."""
    entries = [PlanEntry(tuple(i < n for i in range(4)), ((1.0, 0.0),) * 4, 30.0) for n in budgets]
    made = Provenance("OneStream, float32, weights 0", (), (0, 1, 2, 3), 4, ("default",), (), "output", 0, "", 1, 4.0, {})
    return bw.CalibrationPlan(tuple(entries), made)


def test_a_plan_with_one_entry_is_taken_and_one_with_several_is_not() -> None:
    model = {"calibrated_for": None}
    (cached,) = bw.enable(Pipe({"transformer": OneStream().eval()}), plan_of(2), **model).values()
    assert cached.cache_config.steps_mask == (0, 0, 1, 1)
    message = refused({"transformer": OneStream().eval()}, plan_of(3, 2), **model)
    assert message == ("pipe.transformer: the plan has 2 entries; choose one, as in enable(pipe, plan.at(0.4)). Budgets: 0.75, 0.5.")


def test_a_pipeline_that_is_dropped_is_not_kept_alive() -> None:
    pipe = Pipe({"transformer": OneStream().eval()})
    (cached,) = bw.enable(pipe).values()
    first = pipe.run(4)
    del pipe
    other = Pipe({"transformer": cached})
    assert torch.equal(other.run(4), first), "by the time alone"


def test_the_step_of_an_image_to_start_from_is_counted_from_its_begin() -> None:
    pipe = Pipe({"transformer": OneStream().eval()})
    (cached,) = bw.enable(pipe, **SETTINGS).values()
    pipe.scheduler.begin_index = 2
    pipe.scheduler.timesteps = torch.linspace(1, 0.1, 6)
    for i in range(2, 6):
        pipe.scheduler.step_index = None if i == 2 else i
        with torch.no_grad():
            cached(torch.ones(1, 6, 4), pipe.scheduler.timesteps[i][None])
    assert patterns(cached) == {"call_0": "##.#"}


def test_calls_after_the_run_are_not_taken_for_its_steps() -> None:
    pipe = Pipe({"transformer": OneStream().eval()})
    (cached,) = bw.enable(pipe, policy="adaptive", threshold=float("inf")).values()
    first = pipe.run(4)
    for step in range(5):
        with torch.no_grad():
            cached(torch.ones(1, 6, 4), torch.full((1,), 1 - step / 8))
    assert [record.step for record in cached.report().contexts["default"].steps] == [0, 1, 2, 3, 4], (
        "told by the time, as without a pipeline"
    )
    assert torch.equal(pipe.run(4), first)


def test_calls_are_told_apart_by_setting_where_the_scheduler_counts_no_steps() -> None:
    pipe = Pipe({"transformer": OneStream().eval()})
    bw.enable(pipe, calls_per_step=2, **SETTINGS)
    pipe.scheduler = types.SimpleNamespace(timesteps=torch.linspace(1, 0.1, 4))

    def run() -> list[Tensor]:
        pipe.scheduler.timesteps, x = pipe.scheduler.timesteps.clone(), torch.ones(1, 6, 4)
        with torch.no_grad():
            return [pipe.transformer(x * sign, time[None]) for time in pipe.scheduler.timesteps for sign in (1, -1)]

    first = run()
    assert patterns(pipe.transformer) == {"call_0": "##.#", "call_1": "##.#"}
    assert all(map(torch.equal, run(), first))
    pipe.transformer.configure(calls_per_step=1)
    with pytest.raises(bw.StateError, match=r"^two consecutive calls have the same timestep: .*calls_per_step=2"):
        run()
