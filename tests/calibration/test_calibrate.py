"""Calibration from end to end on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bwcache_compile as bw
from bwcache_compile.calibration import OutputCut
from bwcache_compile.calibration.evaluate import Evaluator, fixed_rule
from bwcache_compile.calibration.generation import Generation, StandIn
from bwcache_compile.calibration.quality import psnr
from bwcache_compile.calibration.recording import Recorder
from bwcache_compile.runtime.fingerprint import model_identity
from tests.calibration.helpers import SCHEDULERS, Denoiser, prompt, replay, sample
from tests.calibration.test_sampler_map import WAYS
from tests.models import OneStream

STEPS = 16


def generate(solver: str = "euler", **how: Any) -> Callable[[nn.Module], Tensor]:
    return lambda model: sample(model, SCHEDULERS[solver], STEPS, **how)


@pytest.mark.parametrize("solver", ["euler", "unipc", "ddim"])
@pytest.mark.parametrize("way", WAYS)
def test_a_fitted_plan_beats_the_linear_rule(solver: str, way: str) -> None:
    model, make = Denoiser(), generate(solver, **WAYS[way])
    plan = bw.calibrate(model, make, budgets=(0.5, 0.375), progress=False)
    assert [entry.computed for entry in plan.entries] == [8, 6]
    full = reference(model, make)
    for entry in plan.entries:
        assert entry.rule == "fitted"
        assert psnr(make(replay(model, plan, entry)), full) == pytest.approx(entry.psnr, abs=0.1)
        linear = Evaluator(OutputCut(model), make).run(entry.mask, fixed_rule("linear"))[1]
        assert entry.psnr > linear + 3
        assert all(
            sum(row) == pytest.approx(0 if computed else 1, abs=1e-6) for row, computed in zip(entry.weights, entry.mask, strict=True)
        )
    assert plan.provenance.model == model_identity(model)


def reference(model: nn.Module, make: Callable[[nn.Module], Tensor]) -> Tensor:
    """Run the plain model, which has no contexts of its own."""
    return make(StandIn(Generation(OutputCut(model), Recorder())))


@pytest.mark.parametrize(("effort", "limit"), [("quick", 4.0), ("thorough", 10.0)])
def test_the_cost_stays_within_the_effort(effort: Any, limit: float) -> None:
    model, make = Denoiser(), generate(guidance=2.5)
    plan = bw.calibrate(model, make, effort=effort, progress=False)
    assert model.calls == pytest.approx(plan.provenance.cost * 2 * STEPS, abs=0.1)
    assert plan.provenance.cost <= limit


def test_calibration_is_deterministic() -> None:
    plans = [bw.calibrate(Denoiser(), generate(guidance=2.5), budgets=(0.4,), progress=False) for _ in range(2)]
    assert plans[0] == plans[1]


def test_what_a_plan_says_of_its_origin() -> None:
    plan = bw.calibrate(Denoiser(), generate("unipc", guidance=2.5, named=True), budgets=(0.5,), progress=False)
    made = plan.provenance
    assert (made.model, made.contexts, made.cut) == (model_identity(Denoiser()), ("cond", "uncond"), "output")
    assert made.timesteps == tuple(map(float, SCHEDULERS["unipc"](STEPS).timesteps))
    assert made.sampler.startswith("sampler recovered from 3 steps")


def test_generate_without_a_fixed_seed_is_named() -> None:
    def unseeded(model: nn.Module) -> Tensor:
        x = torch.randn(1, 4, 8, 8)
        for time in SCHEDULERS["euler"](8).timesteps:
            x = x - 0.1 * model(x, time.expand(1), torch.zeros(1, 8))["sample"]
        return x

    with pytest.raises(bw.ConfigError, match=r"^generate cannot be calibrated: it starts from different noise each time\."):
        bw.calibrate(Denoiser(), unseeded, progress=False)


def test_a_sampler_that_draws_noise_is_named() -> None:
    with pytest.raises(bw.ConfigError, match=r"^generate cannot be calibrated: the sampler is not deterministic: "):
        bw.calibrate(Denoiser(), generate("ancestral"), progress=False)


def test_a_model_that_draws_noise_is_named() -> None:
    class Dropping(Denoiser):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return (
                {"sample": nn.functional.dropout(super().forward(*args)["sample"])}
                if kwargs.get("return_dict", True)
                else (nn.functional.dropout(super().forward(*args)["sample"]),)
            )

    with pytest.raises(bw.ConfigError, match=r"^generate cannot be calibrated: the model returns different outputs for equal inputs\."):
        bw.calibrate(Dropping(), generate(), progress=False)


def test_fixed_rules_are_tried_too_where_the_sampler_is_not_linear() -> None:
    def clipped(model: nn.Module) -> Tensor:
        x, scheduler = torch.ones(1, 4, 8, 8), SCHEDULERS["euler"](STEPS)
        for time in scheduler.timesteps:
            x = scheduler.step(model(x, time.expand(1), torch.zeros(1, 8))["sample"].clamp(-0.3, 0.3), time, x).prev_sample
        return x

    with pytest.warns(bw.CacheWarning, match=r"^the sampler's steps are not a linear combination of latents and outputs \(step \d+: "):
        plan = bw.calibrate(Denoiser(), clipped, budgets=(0.5,), progress=False)
    assert plan.entries[0].rule in ("fitted", "outputs", "hold", "linear", "damped")
    assert plan.provenance.sampler.startswith("sampler not linear")


def test_fixed_rules_are_compared_where_the_latents_are_not_found() -> None:
    class Flat(nn.Module):
        """Takes a list of tokens and returns them as one row."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = Denoiser()

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return self.inner(x.view(1, 4, 8, 8), time, torch.zeros(1, 8))["sample"].flatten()

    def make(model: nn.Module) -> Tensor:
        x, scheduler = torch.ones(4, 64), SCHEDULERS["euler"](STEPS)
        for time in scheduler.timesteps:
            x = scheduler.step(model(x, time.expand(1)).view(4, 64), time, x).prev_sample
        return x

    with pytest.warns(bw.CacheWarning, match=r"^no latents found: no input of the model changes from step to step"):
        plan = bw.calibrate(Flat(), make, budgets=(0.5,), progress=False)
    assert plan.entries[0].rule in ("hold", "linear", "damped")
    assert plan.provenance.sampler == "latents not found"


def test_fewer_plain_steps_are_compared() -> None:
    def plain(model: nn.Module, steps: int) -> Tensor:
        return sample(model, SCHEDULERS["euler"], steps)

    plan = bw.calibrate(Denoiser(), generate(), budgets=(0.5,), progress=False, fewer_steps=plain)
    (entry,) = plan.entries
    assert entry.fewer_steps_psnr is not None
    assert not entry.fewer_steps_wins
    assert f"{entry.fewer_steps_psnr:.1f} dB" in str(plan)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"effort": "some"}, r"^effort must be one of 'quick', 'thorough', got 'some'\.$"),
        ({"budgets": ()}, r"^budgets must be a sequence of shares .*, got \(\)\.$"),
        ({"budgets": 0.4}, r"^budgets must be a sequence of shares .*, got 0\.4\.$"),
        ({"cut": "block"}, r"^cut must be one of 'blocks', 'output', got 'block'\.$"),
        ({"budgets": (2.0,)}, r"^budgets must be shares of computed steps"),
        ({"anchors": 0}, r"^anchors must be from 2 to 8 \(computed steps that a reused step combines\), got 0\.$"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(bw.ConfigError, match=message):
        bw.calibrate(Denoiser(), generate(), progress=False, **settings)


def test_generate_must_use_the_model_it_is_given() -> None:
    model = Denoiser()
    with pytest.raises(bw.ConfigError, match=r"^generate did not call the model that it was given\."):
        bw.calibrate(model, lambda _: sample(model, SCHEDULERS["euler"], 4), progress=False)


def test_generate_must_make_as_many_steps_each_time() -> None:
    counts = iter([8, 9, 9])
    with pytest.raises(
        bw.StateError, match=r"^call 8 of this generation is in context 'default', but the first generation had no more calls\."
    ):
        bw.calibrate(Denoiser(), lambda model: sample(model, SCHEDULERS["euler"], next(counts)), progress=False)


def test_the_stand_in_looks_like_the_model() -> None:
    model = Denoiser()
    plan = bw.calibrate(model, generate(), budgets=(0.5,), progress=False)
    stand_in = replay(model, plan, plan.entry(0.5))
    assert isinstance(stand_in, Denoiser)
    assert stand_in.calls == model.calls
    assert set(stand_in.state_dict()) == set(model.state_dict())


def test_calls_that_a_plan_does_not_have_are_refused() -> None:
    model = Denoiser()
    plan = bw.calibrate(model, generate(guidance=2.5, named=True), budgets=(0.5,), progress=False)
    entry = plan.entry(0.5)
    with pytest.raises(
        bw.StateError, match=r"^call 1 of this generation is in context 'cond', but the first generation had a call in context 'uncond'\."
    ):
        sample(replay(model, plan, entry), SCHEDULERS["euler"], STEPS, named=True)


class HiddenCut:
    """A cut of `Denoiser` before its last layer and the skip: a reused step reads the latents."""

    reads_inputs = True

    def __init__(self, module: Denoiser, anchors: int = 3) -> None:
        self.module, self.anchors = module, anchors

    def fresh(self, args: Any, kwargs: Any) -> tuple[Tensor, ...]:
        return ()

    def compute(self, args: Any, kwargs: Any, state: tuple[Tensor, ...]) -> tuple[Any, tuple[Tensor, ...]]:
        output = self.module(*args, **kwargs)
        return output, (output[0] - 0.3 * args[0], *state)[: self.anchors]

    def reuse(self, args: Any, kwargs: Any, state: tuple[Tensor, ...], weights: Tensor) -> Any:
        total = sum(w * anchor for w, anchor in zip(weights.tolist(), state, strict=False))
        return (total + 0.3 * args[0],)


def test_other_cuts_are_calibrated_too() -> None:
    model, make = Denoiser(), generate(guidance=2.5)
    plan = bw.calibrate(HiddenCut(model), make, budgets=(0.5,), progress=False)
    (entry,) = plan.entries
    assert entry.rule == "fitted"
    assert (plan.provenance.cut, plan.anchors) == ("blocks", 3)
    linear = Evaluator(HiddenCut(model), make).run(entry.mask, fixed_rule("linear"))[1]
    assert entry.psnr > linear + 3
    assert psnr(make(replay(HiddenCut(model), plan, entry)), reference(model, make)) == pytest.approx(entry.psnr, abs=0.1)


def test_half_precision_is_calibrated() -> None:
    model, make = Denoiser().bfloat16(), generate(guidance=2.5)
    plan = bw.calibrate(model, make, budgets=(0.5,), progress=False)
    (entry,) = plan.entries
    assert ", bfloat16, " in plan.provenance.model
    assert plan.provenance.sampler == "sampler recovered from 1 step (within the rounding of the latents)"
    assert entry.psnr >= Evaluator(OutputCut(model), make).run(entry.mask, fixed_rule("linear"))[1]


def test_a_cached_model_is_calibrated_like_the_model_that_it_caches() -> None:
    model = OneStream().eval()

    def make(model: nn.Module) -> Tensor:
        x, _ = OneStream().example()
        for step in range(12):
            x = x + 0.1 * model(x, torch.full((1,), 1 - step / 12))
        return x

    cached = bw.transform(model, num_steps=12)
    with torch.no_grad():
        plan = bw.calibrate(cached, make, budgets=(0.5,), progress=False)
        assert plan.entries == bw.calibrate(model, make, budgets=(0.5,), progress=False).entries
    assert plan.provenance.model == model_identity(model)


def test_a_compiled_model_is_calibrated(capsys: pytest.CaptureFixture[str]) -> None:
    model = Denoiser()
    plan = bw.calibrate(torch.compile(model, backend="eager"), generate(), budgets=(0.5,))  # type: ignore[arg-type]
    assert plan.provenance.model.startswith("Denoiser, float32, weights ")
    assert "recording 0.00 MiB per step on the host (latents and 1 output); 50 steps take 0 MiB" in capsys.readouterr().err


def test_guidance_at_some_steps_only() -> None:
    def make(model: nn.Module) -> Tensor:
        x, scheduler = torch.ones(1, 4, 8, 8), SCHEDULERS["euler"](STEPS)
        for step, time in enumerate(scheduler.timesteps):
            with model.cache_context("cond", num_inference_steps=STEPS):  # type: ignore[operator]
                y = model(x, time.expand(1), prompt(2))["sample"]
            if 3 <= step < 12:
                with model.cache_context("uncond", num_inference_steps=STEPS):  # type: ignore[operator]
                    free = model(x, time.expand(1), prompt(1))["sample"]
                y = free + 2.5 * (y - free)
            x = scheduler.step(y, time, x).prev_sample
        return x

    model = Denoiser()
    plan = bw.calibrate(model, make, budgets=(0.5,), progress=False)
    (entry,) = plan.entries
    assert entry.rule == "fitted"
    assert plan.provenance.contexts == ("cond", "uncond")
    assert [name for step, name in plan.provenance.calls if step == 2] == ["cond"]
    assert [name for step, name in plan.provenance.calls if step == 3] == ["cond", "uncond"]
    assert entry.psnr > 40
    assert psnr(make(replay(model, plan, entry)), reference(model, make)) == pytest.approx(entry.psnr, abs=0.1)
