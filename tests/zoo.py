"""Tiny configurations of real diffusers models, built without a hub. Each input changes with the step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model class at a tiny size.

    Attributes:
        build: Makes the model; seeded by `make`.
        inputs: Keyword arguments of the call at one step of four.
        stacks: Names of the main stacks' module lists, in execution order, with the configured number of blocks.
        streams: Block inputs that the blocks' outputs continue, in output order.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    stacks: dict[str, int]
    streams: tuple[str, ...] = ("hidden_states",)

    def make(self) -> nn.Module:
        """Build the model in evaluation mode; every weight is drawn, zero-initialised gates too, so that blocks matter."""
        torch.manual_seed(0)
        model = self.build().eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() < 2 or not parameter.any():
                parameter.data = torch.where(parameter == 0, torch.randn_like(parameter) * 0.1, parameter)
        return model


def noise(name: str, step: int, *shape: int) -> Tensor:
    """Draw a tensor that moves a little from step to step, as latents do."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    base, drift = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    return base + 0.05 * step * drift


def _time(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([900 - 40 * step], dtype=dtype)


def _wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=32, num_layers=3, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip


def _hunyuan_video() -> nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=2, num_single_layers=3,
        num_refiner_layers=2, patch_size=2, patch_size_t=1, guidance_embeds=True, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip


def _cogvideox() -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=8,
        num_layers=3, sample_width=8, sample_height=8, sample_frames=8, patch_size=2, patch_size_t=2,
        temporal_compression_ratio=4, max_text_seq_length=6, use_rotary_positional_embeddings=True, patch_bias=False,
    )  # fmt: skip


def _ltx() -> nn.Module:
    from diffusers import LTXVideoTransformer3DModel

    return LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24, num_layers=3,
        caption_channels=16,
    )  # fmt: skip


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=3, attention_head_dim=12, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(4, 4, 4),
    )  # fmt: skip


def _dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=4,
    )  # fmt: skip


def _pixart() -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3, cross_attention_dim=16,
        sample_size=8, patch_size=2, caption_channels=8, norm_num_groups=4, use_additional_conditions=False,
    )  # fmt: skip


ZOO = {
    "wan": Entry(
        _wan,
        lambda s: {
            "hidden_states": noise("x", s, 1, 4, 2, 8, 8),
            "timestep": _time(s),
            "encoder_hidden_states": noise("text", 0, 1, 5, 16),
        },
        {"blocks": 3},
    ),
    "hunyuan_video": Entry(
        _hunyuan_video,
        lambda s: {
            "hidden_states": noise("x", s, 1, 4, 2, 8, 8),
            "timestep": _time(s, torch.int64),
            "encoder_hidden_states": noise("text", 0, 1, 6, 16),
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
            "pooled_projections": noise("pooled", 0, 1, 8),
            "guidance": torch.tensor([6000.0]),
        },
        {"transformer_blocks": 2, "single_transformer_blocks": 3},
        ("hidden_states", "encoder_hidden_states"),
    ),
    "cogvideox15": Entry(
        _cogvideox,
        lambda s: {
            "hidden_states": noise("x", s, 1, 2, 4, 8, 8),
            "encoder_hidden_states": noise("text", 0, 1, 6, 8),
            "timestep": _time(s, torch.int64),
            "image_rotary_emb": (noise("cos", 0, 16, 16), noise("sin", 0, 16, 16)),
        },
        {"transformer_blocks": 3},
        ("hidden_states", "encoder_hidden_states"),
    ),
    "ltx": Entry(
        _ltx,
        lambda s: {
            "hidden_states": noise("x", s, 1, 32, 8),
            "encoder_hidden_states": noise("text", 0, 1, 6, 16),
            "timestep": _time(s),
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
            "num_frames": 2,
            "height": 4,
            "width": 4,
        },
        {"transformer_blocks": 3},
    ),
    "flux": Entry(
        _flux,
        lambda s: {
            "hidden_states": noise("x", s, 1, 16, 4),
            "encoder_hidden_states": noise("text", 0, 1, 6, 16),
            "pooled_projections": noise("pooled", 0, 1, 8),
            "timestep": _time(s) / 1000,
            "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
            "txt_ids": torch.zeros(6, 3),
            "guidance": torch.tensor([3.5]),
        },
        {"transformer_blocks": 2, "single_transformer_blocks": 3},
        ("encoder_hidden_states", "hidden_states"),
    ),
    "dit": Entry(
        _dit,
        lambda s: {
            "hidden_states": noise("x", s, 1, 4, 8, 8),
            "timestep": _time(s, torch.int64),
            "class_labels": torch.tensor([7]),
        },
        {"transformer_blocks": 3},
    ),
    "pixart": Entry(
        _pixart,
        lambda s: {
            "hidden_states": noise("x", s, 1, 4, 8, 8),
            "encoder_hidden_states": noise("text", 0, 1, 6, 8),
            "timestep": _time(s, torch.int64),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        {"transformer_blocks": 3},
    ),
}
