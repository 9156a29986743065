"""Real diffusers pipelines around tiny random models, without a hub: embeddings are handed in, latents come back."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo import ZOO, noise

STEPS = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """A pipeline at a tiny size.

    Attributes:
        build: Makes the pipeline around a transformer.
        model: Makes the transformer.
        call: Arguments of a run, from a width in pixels and a prompt length.
        widths: Two widths that the pipeline takes, at the height of the first.
        contexts: Names under which the pipeline calls its transformer.
    """

    build: Callable[[nn.Module], Any]
    model: Callable[[], nn.Module]
    call: Callable[[int, int], dict[str, Any]]
    widths: tuple[int, int]
    contexts: tuple[str, ...]

    def pipeline(self, model: nn.Module) -> Any:
        """Build the pipeline, silent."""
        pipe = self.build(model)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def run(self, pipe: Any, width: int, length: int, **more: Any) -> Tensor:
        """Generate latents in the dtype of the pipeline's model; the noise is the same each time."""
        with torch.no_grad():
            dtype = pipe.transformer.dtype
            given = {name: value.to(dtype) if _is_floating(value) else value for name, value in self.call(width, length).items()}
            settings = {"num_inference_steps": STEPS, "output_type": "latent", "return_dict": False, "height": self.widths[0]}
            generator = torch.Generator().manual_seed(0)
            return pipe(**{**given, **settings, **more}, width=width, generator=generator)[0]

    def break_off(self, pipe: Any, width: int, length: int, after: int, **more: Any) -> None:
        """Begin to generate, and stop after some steps, as a server does whose client is gone."""

        def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            pipe._interrupt = step == after - 1
            return tensors

        self.run(pipe, width, length, callback_on_step_end=stop, **more)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _prompts(length: int, width: int) -> dict[str, Tensor]:
    return {"prompt_embeds": noise("prompt", 0, 1, length, width), "negative_prompt_embeds": noise("none", 0, 1, length, width)}


def _wan(model: nn.Module) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    return WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(), transformer=model)


def _hunyuan_video(model: nn.Module) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline

    return HunyuanVideoPipeline(None, None, model, None, FlowMatchEulerDiscreteScheduler(), None, None)


def _cogvideox(model: nn.Module) -> Any:
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline

    return CogVideoXPipeline(None, None, None, model, CogVideoXDDIMScheduler())


def _ltx(model: nn.Module) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline

    return LTXPipeline(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), None, None, None, model)


def _flux(model: nn.Module) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    return FluxPipeline(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), None, None, None, None, None, model)


def _latte(model: nn.Module) -> Any:
    from diffusers import DDIMScheduler, LattePipeline

    return LattePipeline(None, None, None, model, DDIMScheduler())


def _sd3(model: nn.Module) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    return StableDiffusion3Pipeline(model, FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, None, None)


def _kandinsky5(model: nn.Module) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky5T2VPipeline

    return Kandinsky5T2VPipeline(model, None, None, None, None, None, FlowMatchEulerDiscreteScheduler())


class _Part(nn.Module):
    """A model that a pipeline wants to have, and does not call."""

    device, dtype = torch.device("cpu"), torch.float32


def _cosmos(model: nn.Module) -> Any:
    from diffusers import CosmosTextToWorldPipeline, EDMEulerScheduler

    # it refuses to run without a safety checker, which sees prompts as text alone
    return CosmosTextToWorldPipeline(None, None, model, None, EDMEulerScheduler(), safety_checker=_Part())


def _allegro(model: nn.Module) -> Any:
    from diffusers import AllegroPipeline, EulerDiscreteScheduler

    return AllegroPipeline(None, None, None, model, EulerDiscreteScheduler())


def _easyanimate(model: nn.Module) -> Any:
    from diffusers import EasyAnimatePipeline, FlowMatchEulerDiscreteScheduler

    vae = _Part()
    vae.spatial_compression_ratio, vae.temporal_compression_ratio = 8, 4
    vae.config = types.SimpleNamespace(latent_channels=4)
    return EasyAnimatePipeline(vae, None, None, model, FlowMatchEulerDiscreteScheduler())


def _sana_video(model: nn.Module) -> Any:
    from diffusers import DPMSolverMultistepScheduler, SanaVideoPipeline

    return SanaVideoPipeline(None, None, None, model, DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True))


def _masked(length: int, width: int) -> dict[str, Tensor]:
    return {
        **_prompts(length, width),
        "prompt_attention_mask": torch.ones(1, length),
        "negative_prompt_attention_mask": torch.ones(1, length),
    }


def _pooled(name: str) -> Tensor:
    return noise(name, 0, 1, 8)


CASES = {
    "wan": Case(
        _wan, ZOO["wan"].make, lambda w, n: {**_prompts(n, 16), "num_frames": 5, "guidance_scale": 4.0}, (32, 48), ("cond", "uncond")
    ),
    "hunyuan_video": Case(
        _hunyuan_video,
        ZOO["hunyuan_video"].make,
        lambda w, n: {
            **_prompts(n, 16),
            "prompt_attention_mask": torch.ones(1, n),
            "negative_prompt_attention_mask": torch.ones(1, n),
            "pooled_prompt_embeds": _pooled("pooled"),
            "negative_pooled_prompt_embeds": _pooled("nothing"),
            "true_cfg_scale": 4.0,
            "num_frames": 5,
        },
        (32, 48),
        ("cond", "uncond"),
    ),
    "cogvideox": Case(
        _cogvideox,
        ZOO["cogvideox15"].make,
        lambda w, n: {**_prompts(n, 8), "num_frames": 5, "guidance_scale": 4.0},
        (64, 48),  # the rotary table is cut from one of the model's own size
        ("cond_uncond",),
    ),
    "ltx": Case(
        _ltx,
        ZOO["ltx"].make,
        lambda w, n: {
            **_prompts(n, 16),
            "prompt_attention_mask": torch.ones(1, n),
            "negative_prompt_attention_mask": torch.ones(1, n),
            "num_frames": 9,
            "guidance_scale": 4.0,
        },
        (64, 96),
        ("cond_uncond",),
    ),
    "flux": Case(
        _flux,
        ZOO["flux"].make,
        lambda w, n: {
            **_prompts(n, 16),
            "pooled_prompt_embeds": _pooled("pooled"),
            "negative_pooled_prompt_embeds": _pooled("nothing"),
            "true_cfg_scale": 4.0,
        },
        (32, 48),
        ("cond", "uncond"),
    ),
    "latte": Case(
        _latte,
        ZOO["latte"].make,
        lambda w, n: {**_prompts(n, 16), "negative_prompt": None, "video_length": 2, "guidance_scale": 4.0},
        (32, 48),
        ("default",),
    ),
}

UNNAMED = {
    "sd3": Case(
        _sd3,
        ZOO["sd3"].make,
        lambda w, n: {
            **_prompts(n, 16),
            "pooled_prompt_embeds": _pooled("pooled"),
            "negative_pooled_prompt_embeds": _pooled("nothing"),
            "guidance_scale": 4.0,
        },
        (64, 48),
        ("default",),
    ),
    "kandinsky5": Case(
        _kandinsky5,
        ZOO["kandinsky5"].make,
        lambda w, n: {
            **{f"{name}_qwen": value for name, value in _prompts(n, 16).items()},
            "prompt_embeds_clip": _pooled("pooled"),
            "negative_prompt_embeds_clip": _pooled("nothing"),
            "prompt_cu_seqlens": torch.tensor([0, n], dtype=torch.int32),
            "negative_prompt_cu_seqlens": torch.tensor([0, n], dtype=torch.int32),
            "num_frames": 5,
            "guidance_scale": 4.0,
        },
        (64, 96),
        ("call_0", "call_1"),
    ),
    "cosmos": Case(
        _cosmos,
        ZOO["cosmos"].make,
        lambda w, n: {**_prompts(n, 16), "num_frames": 9, "guidance_scale": 4.0},
        (64, 96),
        ("call_0", "call_1"),
    ),
    "allegro": Case(
        _allegro,
        ZOO["allegro"].make,
        lambda w, n: {**_masked(n, 16), "negative_prompt": None, "num_frames": 2, "guidance_scale": 4.0},
        (64, 96),
        ("default",),
    ),
    "easyanimate": Case(
        _easyanimate,
        ZOO["easyanimate"].make,
        lambda w, n: {**_masked(n, 16), "num_frames": 5, "guidance_scale": 4.0},
        (64, 96),
        ("default",),
    ),
    "sana_video": Case(
        _sana_video,
        ZOO["sana_video"].make,
        lambda w, n: {**_masked(n, 16), "negative_prompt": None, "frames": 5, "guidance_scale": 4.0, "use_resolution_binning": False},
        (64, 96),
        ("default",),
    ),
}
"""Pipelines that open no cache context: those with `default` call once a step, with both prompts in a batch, the others twice."""
