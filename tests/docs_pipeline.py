"""A pipeline as the pages of the documentation use one: a tiny video transformer with random weights, and a loop around it."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

STEPS = 12


def _model() -> WanTransformer3DModel:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_layers=3, num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32
    )
    return model.eval().requires_grad_(False)


class Pipeline:
    """Generates with guidance in two calls a step, under Euler, as diffusers' pipelines do."""

    def __init__(self) -> None:
        self.transformer: Any = _model()

    def __call__(self, prompt: Tensor, num_inference_steps: int = STEPS, generator: torch.Generator | None = None) -> SimpleNamespace:
        latents = torch.randn(1, 4, 2, 8, 8, generator=generator)
        times = torch.linspace(1, 0, num_inference_steps + 1)
        with torch.no_grad():
            for now, following in itertools.pairwise(times):
                velocity = {}
                for name, text in (("cond", prompt), ("uncond", torch.zeros_like(prompt))):
                    with self.transformer.cache_context(name):
                        velocity[name] = self.transformer(latents, 1000 * now[None], text, return_dict=False)[0]
                latents = latents + (following - now) * (velocity["uncond"] + 3 * (velocity["cond"] - velocity["uncond"]))
        return SimpleNamespace(frames=latents)


pipe = Pipeline()
prompt, another_prompt = torch.randn(2, 1, 6, 16, generator=torch.Generator().manual_seed(1))
example = (torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(2)), torch.ones(1), prompt)
