"""The tiny video diffusion transformer: a diffusers Wan model, its weights and its sampler.

The model predicts the clean clip, from which the velocity of the flow follows: a patch holds as many numbers as the model
is wide, and noise, unlike pictures, does not fit through. Its input carries three channels of coordinates beside the
three of colour, because rotary embeddings tell how far apart two tokens are, not where the walls are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from data import FRAMES, SIZE, TOKEN_WIDTH
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor

WEIGHTS = Path(__file__).with_name("weights.safetensors")
GUIDANCE = 2.5
SHIFT = 2.0

Solver = Literal["euler", "unipc"]


def build() -> WanTransformer3DModel:
    """Build the model with fresh weights: 12 blocks of width 96 over 256 tokens per clip."""
    return WanTransformer3DModel(
        patch_size=(2, 4, 4),
        num_attention_heads=3,
        attention_head_dim=32,
        in_channels=6,
        out_channels=3,
        text_dim=TOKEN_WIDTH,
        freq_dim=128,
        ffn_dim=384,
        num_layers=12,
        cross_attn_norm=True,
        rope_max_seq_len=64,
    )


def load(weights: Path = WEIGHTS) -> WanTransformer3DModel:
    """Load weights (stored in float16) into a float32 model in evaluation mode."""
    model = build()
    model.load_state_dict({name: value.float() for name, value in load_file(weights).items()})
    return model.eval().requires_grad_(False)


def with_coordinates(clips: Tensor) -> Tensor:
    """Append channels that run from -1 to 1 along time, height and width: float32[B, 6, FRAMES, SIZE, SIZE]."""
    axes = [torch.linspace(-1, 1, length) for length in clips.shape[2:]]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    return torch.cat([clips, grid.expand(len(clips), -1, -1, -1, -1)], dim=1)


def draw_noise(clips: int, seed: int) -> Tensor:
    """Draw where a generation starts: float32[clips, 3, FRAMES, SIZE, SIZE]."""
    return torch.randn(clips, 3, FRAMES, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def scheduler_of(solver: Solver, steps: int) -> Any:
    """Return diffusers' scheduler of a solver with its timesteps set: Euler, or UniPC of order 2, which Wan pipelines use."""
    if solver == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT)
    else:
        scheduler = UniPCMultistepScheduler(
            num_train_timesteps=1000, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
        )
    scheduler.set_timesteps(steps)
    return scheduler


@torch.no_grad()
def sample(
    model: Any,
    tokens: Tensor,
    noise: Tensor,
    steps: int,
    on_step: Callable[[], None] = lambda: None,
    solver: Solver = "euler",
    guidance: float = GUIDANCE,
) -> Tensor:
    """Generate clips with classifier-free guidance, two calls a step, as a diffusers pipeline does.

    Args:
        model: The model, or a cached or compiled form of it.
        tokens: Condition, float32[B, OBJECTS, TOKEN_WIDTH].
        noise: float32[B, 3, FRAMES, SIZE, SIZE], see `draw_noise`.
        steps: Denoising steps.
        on_step: Called after each step, for a progress bar.
        solver: How the latents move from step to step.
        guidance: How far to go from the unconditional clip to the conditional one.

    Returns:
        float32[B, 3, FRAMES, SIZE, SIZE] in [-1, 1].
    """
    scheduler = scheduler_of(solver, steps)
    latents, nothing = noise, torch.zeros_like(tokens)
    context = getattr(model, "_orig_mod", model).cache_context
    for index, timestep in enumerate(scheduler.timesteps):
        time, noisy = timestep.float().expand(len(latents)), with_coordinates(latents)
        sigma = scheduler.sigmas[index]
        known = {"step_index": index, "sigma": sigma, "num_inference_steps": steps}
        with context("cond", **known):
            conditioned = model(noisy, time, tokens, return_dict=False)[0]
        with context("uncond", **known):
            free = model(noisy, time, nothing, return_dict=False)[0]
        clean = free + guidance * (conditioned - free)
        latents = scheduler.step((latents - clean) / sigma, timestep, latents, return_dict=False)[0]
        on_step()
    return latents.clamp(-1, 1)
