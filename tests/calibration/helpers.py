"""A tiny denoiser and loops around it, with solvers of diffusers and without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn

from bwcache_compile.calibration import CalibrationPlan, CutModel, OutputCut, PlanEntry
from bwcache_compile.calibration.generation import Generation, StandIn, table_rule
from bwcache_compile.calibration.recording import Recorder

Make = Callable[[int], Any]


def _set(scheduler: Any, steps: int) -> Any:
    scheduler.set_timesteps(steps)
    return scheduler


SCHEDULERS: dict[str, Make] = {
    "euler": lambda n: _set(FlowMatchEulerDiscreteScheduler(shift=2.0), n),
    "unipc": lambda n: _set(UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0), n),
    "dpm": lambda n: _set(DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_order=2), n),
    "ddim": lambda n: _set(DDIMScheduler(clip_sample=False), n),
    "heun": lambda n: _set(FlowMatchHeunDiscreteScheduler(shift=2.0), n),
    "ancestral": lambda n: _set(EulerAncestralDiscreteScheduler(), n),
}


class Denoiser(nn.Module):
    """A small convolutional network of latents, time and a prompt; it may take channels more than it returns."""

    def __init__(self, channels: int = 4, appended: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Conv2d(channels + appended, 16, 3, padding=1)
        self.time, self.prompt = nn.Linear(1, 16), nn.Linear(8, 16)
        self.middle, self.leave = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, channels, 3, padding=1)
        self.calls = 0
        self.eval().requires_grad_(False)

    def forward(self, latents: Tensor, time: Tensor, prompt: Tensor, return_dict: bool = True) -> Any:
        self.calls += 1
        hidden = self.enter(latents) + self.time(time.to(latents.dtype).view(-1, 1) / 1000)[:, :, None, None]
        hidden = torch.tanh(hidden + self.prompt(prompt)[:, :, None, None])
        output = self.leave(torch.tanh(self.middle(hidden))) + 0.3 * latents[:, : self.leave.out_channels]
        return {"sample": output} if return_dict else (output,)


def prompt(seed: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 8, generator=torch.Generator().manual_seed(seed))


def latents(seed: int, batch: int = 1, channels: int = 4, size: int = 8) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sample(
    model: Any,
    make: Make,
    steps: int = 12,
    guidance: float = 0.0,
    named: bool = False,
    batched: bool = False,
    extra: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Generate as a pipeline does: without guidance, with two calls a step, or with both prompts in a batch."""
    scheduler = make(steps)
    x = latents(0).to(next(iter(model.parameters())).dtype).float() * float(getattr(scheduler, "init_noise_sigma", 1.0))
    dtype = next(iter(model.parameters())).dtype
    more = {"generator": generator} if generator is not None else {}

    def call(x: Tensor, time: Tensor, p: Tensor, name: str) -> Tensor:
        x = x if extra is None else torch.cat([x, extra.expand(len(x), -1, -1, -1)], 1)
        if not named:
            return model(x.to(dtype), time.expand(len(x)), p.to(dtype), return_dict=False)[0].float()
        with model.cache_context(name):
            return model(x.to(dtype), time.expand(len(x)), p.to(dtype), return_dict=False)[0].float()

    for time in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, time) if hasattr(scheduler, "scale_model_input") else x
        if batched:
            free, conditioned = call(torch.cat([scaled, scaled]), time, torch.cat([prompt(1), prompt(2)]), "cond_uncond").chunk(2)
            y = free + guidance * (conditioned - free)
        else:
            y = call(scaled, time, prompt(2), "cond")
            if guidance:
                free = call(scaled, time, prompt(1), "uncond")
                y = free + guidance * (y - free)
        x = scheduler.step(y, time, x, return_dict=False, **more)[0]
    return x


def replay(model: nn.Module | CutModel, plan: CalibrationPlan, entry: PlanEntry) -> nn.Module:
    """Return a stand-in that runs one generation by an entry of a plan, without graphs."""
    cut = OutputCut(model, plan.anchors) if isinstance(model, nn.Module) else model
    return StandIn(Generation(cut, Recorder(schedule=plan.provenance.calls), entry.mask, table_rule(entry.weights)))


def guided_euler(model: Any, steps: int, shift: float = 0.0) -> Tensor:
    """Take Euler steps with guidance, in two calls a step."""
    times = torch.linspace(1, 0.1, steps) + shift
    latents = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(1))
    for now, following in zip(times, [*times[1:], torch.tensor(0.0)], strict=True):
        with model.cache_context("cond"):
            conditioned = model(latents, now.reshape(1))
        with model.cache_context("uncond"):
            free = model(latents * 0.5, now.reshape(1))
        latents = latents + (following - now) * (free + 1.5 * (conditioned - free))
    return latents
