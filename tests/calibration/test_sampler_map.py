"""The sampler's step is recovered from two generations, whatever the solver and the guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from bwcache_compile.calibration import masks
from bwcache_compile.calibration.cut_model import OutputCut
from bwcache_compile.calibration.evaluate import fixed_rule
from bwcache_compile.calibration.generation import Generation, StandIn
from bwcache_compile.calibration.moving_input import MAX_ELEMENTS, MovingInput
from bwcache_compile.calibration.recording import RecordedStep, Recorder, context_names
from bwcache_compile.calibration.sampler_map import SamplerMap, difference, first_difference, recover_map
from tests.calibration.helpers import SCHEDULERS, Denoiser, sample


def record(model: Denoiser, mask: masks.Mask | None = None, like: Recorder | None = None, **how: Any) -> Recorder:
    run = Generation(OutputCut(model), Recorder(*((like.moving_input, like.schedule) if like else ())), mask, fixed_rule("linear"))
    sample(StandIn(run), **how)
    return run.recorder


def predicted(sampler: SamplerMap, run: Sequence[RecordedStep], full: Sequence[RecordedStep], step: int) -> Tensor:
    total = sampler.known(run, full, step)
    for (key, piece), value in sampler.output_coefficients(step).items():
        total = total + value * difference(run, full, step, key, piece)
    return total


WAYS: dict[str, dict[str, Any]] = {
    "one call": {},
    "two calls": {"guidance": 2.5},
    "named calls": {"guidance": 2.5, "named": True},
    "one batch": {"guidance": 2.5, "batched": True},
}


@pytest.mark.parametrize(
    ("solver", "depth", "calls"), [("euler", 0, 12), ("ddim", 0, 12), ("dpm", 1, 12), ("heun", 1, 23), ("unipc", 2, 12)]
)
@pytest.mark.parametrize("way", WAYS)
def test_the_map_foretells_other_generations(solver: str, depth: int, calls: int, way: str) -> None:
    model, how = Denoiser(), {**WAYS[way], "make": SCHEDULERS[solver]}
    full = record(model, **how)
    steps = len(full.steps)
    assert steps == calls, "a step of Heun's second order has two calls, each with latents of its own"
    probe = record(model, masks.probe_mask(steps), full, **how)
    assert first_difference(probe.steps, full.steps, masks.probe_mask(steps)) == "same"
    sampler = recover_map([probe.steps], full.steps)
    assert sampler.explained
    assert sampler.depth <= depth
    other = record(model, masks.dense_ends(steps // 2, steps), full, **how)
    for step in range(1, steps - 1):
        true = difference(other.steps, full.steps, step + 1, "", 0)
        error = (predicted(sampler, other.steps, full.steps, step) - true).norm()
        assert error <= 5e-2 * true.norm() + 1e-5, step


@pytest.mark.parametrize(
    ("way", "contexts", "pieces"),
    [
        ("one call", ("default",), 1),
        ("two calls", ("call_0", "call_1"), 1),
        ("named calls", ("cond", "uncond"), 1),
        ("one batch", ("default",), 2),
    ],
)
def test_contexts_and_pieces(way: str, contexts: tuple[str, ...], pieces: int) -> None:
    how = dict(WAYS[way])
    full = record(Denoiser(), **how, make=SCHEDULERS["euler"])
    assert context_names(full.steps) == (("cond_uncond",) if how.get("named") and how.get("batched") else contexts)
    assert {len(output) for step in full.steps for output in step.outputs.values()} == {pieces}
    assert full.moving_input is not None
    assert full.moving_input.pieces == pieces


def test_a_sampler_that_draws_noise_is_not_deterministic() -> None:
    model, how = Denoiser(), {"make": SCHEDULERS["ancestral"]}
    full = record(model, **how)
    mask = masks.probe_mask(len(full.steps))
    assert first_difference(record(model, mask, full, **how).steps, full.steps, mask) == "sampler"


def test_noise_from_a_seeded_generator_is_deterministic() -> None:
    model = Denoiser()

    def seeded() -> dict[str, Any]:
        return {"make": SCHEDULERS["ancestral"], "generator": torch.Generator().manual_seed(0)}

    full = record(model, **seeded())
    mask = masks.probe_mask(len(full.steps))
    probe = record(model, mask, full, **seeded())
    assert first_difference(probe.steps, full.steps, mask) == "same"
    assert recover_map([probe.steps], full.steps).explained


def test_appended_channels_are_left_out() -> None:
    model, how = Denoiser(appended=2), {"make": SCHEDULERS["euler"], "extra": torch.ones(1, 2, 8, 8)}
    full = record(model, **how)
    assert full.moving_input is not None
    assert full.moving_input.channels == 4
    assert full.steps[0].moving is not None
    assert full.steps[0].moving.shape == (4 * 8 * 8,)


def test_half_precision_latents_are_explained_within_their_rounding() -> None:
    model, how = Denoiser().bfloat16(), {"make": SCHEDULERS["euler"], "guidance": 2.5}
    full = record(model, **how)
    probe = record(model, masks.probe_mask(len(full.steps)), full, **how)
    sampler = recover_map([probe.steps], full.steps)
    assert sampler.explained
    assert sampler.depth == 0


def test_a_nonlinear_sampler_is_noticed() -> None:
    class Clipping:
        """Scales each output to unit size, as guidance rescaling does."""

        def __init__(self, steps: int) -> None:
            self.inner = SCHEDULERS["euler"](steps)
            self.timesteps = self.inner.timesteps

        def step(self, y: Tensor, time: Tensor, x: Tensor, return_dict: bool) -> tuple[Tensor, ...]:
            return self.inner.step(torch.clamp(y, -0.3, 0.3), time, x, return_dict=return_dict)

    model, how = Denoiser(), {"make": Clipping}
    full = record(model, **how)
    probe = record(model, masks.probe_mask(len(full.steps)), full, **how)
    sampler = recover_map([probe.steps], full.steps)
    assert not sampler.explained
    assert sampler.residual > 0.01


def test_large_latents_are_sampled() -> None:
    first, output = torch.zeros(1, 4, 300, 300), torch.zeros(1, 4, 300, 300)
    second = first + 1
    found = MovingInput.of((0, 0), first, second, output)
    assert found.read_input(second).numel() == MAX_ELEMENTS
    second[:, :, :, 100:] = 0
    found = MovingInput.of((0, 0), first, second, output)
    assert torch.equal(found.read_input(second), torch.ones(4 * 300 * 100)), "what does not move, such as a reference image, is left out"


def test_two_videos_in_a_batch_are_no_guidance() -> None:
    same = torch.randn(1, 4, 8, 8).expand(2, -1, -1, -1)
    assert MovingInput.of((0, 0), same, same + 1, same).pieces == 2
    apart = torch.cat([same[:1] + 1, same[1:] + 2])
    assert MovingInput.of((0, 0), same, apart, same).pieces == 1, "they start alike, and part"
