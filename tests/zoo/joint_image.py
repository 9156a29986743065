"""Image models of two streams, or of text and image rows joined."""

from __future__ import annotations

import torch

from tests.zoo.entry import Entry, noise, time

_JOINT = ("encoder_hidden_states", "hidden_states")
_FLUX = {
    "patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 12,
    "num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (4, 4, 4),
}  # fmt: skip
_PLACES = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))


def _tokens(step: int) -> dict[str, torch.Tensor]:
    return {
        "hidden_states": noise("x", step, 1, 16, 4),
        "encoder_hidden_states": noise("text", 0, 1, 6, 16),
        "timestep": time(step) / 1000,
        "img_ids": _PLACES,
        "txt_ids": torch.zeros(6, 3),
    }


def _sizes(step: int) -> dict[str, torch.Tensor]:
    sizes = {name: torch.tensor([[16, 16]]) for name in ("original_size", "target_size", "crop_coords")}
    return {
        "hidden_states": noise("x", step, 1, 4, 8, 8),
        "encoder_hidden_states": noise("text", 0, 1, 5, 16),
        "timestep": time(step),
        **sizes,
    }


JOINT_IMAGE = {
    "flux": Entry(
        "FluxTransformer2DModel",
        {**_FLUX, "pooled_projection_dim": 8, "guidance_embeds": True},
        lambda s: {**_tokens(s), "pooled_projections": noise("pooled", 0, 1, 8), "guidance": torch.tensor([3.5])},
        {"transformer_blocks": 2, "single_transformer_blocks": 3},
        _JOINT,
    ),
    "chroma": Entry(
        "ChromaTransformer2DModel",
        {**_FLUX, "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
        _tokens,
        {"transformer_blocks": 2, "single_transformer_blocks": 3},
        _JOINT,
        rows=slice(6, 22),
    ),
    "bria": Entry(
        "BriaTransformer2DModel",
        _FLUX,
        _tokens,
        {"transformer_blocks": 2, "single_transformer_blocks": 3},
        _JOINT,
    ),
    "qwen_image": Entry(
        "QwenImageTransformer2DModel",
        {
            "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 3, "attention_head_dim": 12,
            "num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (4, 4, 4),
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 16, 16),
            "encoder_hidden_states": noise("text", 0, 1, 6, 16),
            "encoder_hidden_states_mask": torch.ones(1, 6, dtype=torch.int64),
            "timestep": time(s) / 1000,
            "img_shapes": [(1, 4, 4)],
        },
        {"transformer_blocks": 3},
        _JOINT,
    ),
    "sd3": Entry(
        "SD3Transformer2DModel",
        {
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 3, "attention_head_dim": 8,
            "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 8,
            "out_channels": 4, "pos_embed_max_size": 8, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 4, 8, 8),
            "encoder_hidden_states": noise("text", 0, 1, 6, 16),
            "pooled_projections": noise("pooled", 0, 1, 8),
            "timestep": time(s),
        },
        {"transformer_blocks": 3},
        _JOINT,
    ),
    "cogview3": Entry(
        "CogView3PlusTransformer2DModel",
        {
            "patch_size": 2, "in_channels": 4, "num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 2, "out_channels": 4,
            "text_embed_dim": 16, "time_embed_dim": 8, "condition_dim": 4, "pos_embed_max_size": 8, "sample_size": 8,
        },
        _sizes,
        {"transformer_blocks": 3},
        ("hidden_states", "encoder_hidden_states"),
    ),
    "cogview4": Entry(
        "CogView4Transformer2DModel",
        {
            "patch_size": 2, "in_channels": 4, "num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 2, "out_channels": 4,
            "text_embed_dim": 16, "time_embed_dim": 8, "condition_dim": 4, "pos_embed_max_size": 8, "sample_size": 8,
            "rope_axes_dim": (8, 8),
        },
        _sizes,
        {"transformer_blocks": 3},
        ("hidden_states", "encoder_hidden_states"),
    ),
    "aura_flow": Entry(
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 2, "num_single_dit_layers": 3,
            "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 16,
            "out_channels": 4, "pos_embed_max_size": 16,
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 4, 8, 8),
            "encoder_hidden_states": noise("text", 0, 1, 5, 16),
            "timestep": time(s) / 1000,
        },
        {"joint_transformer_blocks": 2, "single_transformer_blocks": 3},
        _JOINT,
        rows=slice(13, 29),
    ),
}  # fmt: skip
