"""Video models of one stream, or of text and video rows side by side."""

from __future__ import annotations

import torch

from tests.zoo.entry import Entry, noise, rotary, time

_WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
    "text_dim": 16, "freq_dim": 32, "ffn_dim": 32, "num_layers": 3, "cross_attn_norm": True, "rope_max_seq_len": 32,
}  # fmt: skip
COGVIDEOX = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
    "text_embed_dim": 8, "num_layers": 3, "sample_width": 8, "sample_height": 8, "sample_frames": 5,
    "patch_size": 2, "temporal_compression_ratio": 4, "max_text_seq_length": 6,
}  # fmt: skip
_TEXT_AND_VIDEO = ("hidden_states", "encoder_hidden_states")


def _latents(step: int, *shape: int) -> dict[str, torch.Tensor]:
    return {
        "hidden_states": noise("x", step, *(shape or (1, 4, 2, 8, 8))),
        "timestep": time(step),
        "encoder_hidden_states": noise("text", 0, 1, 5, 16),
    }


VIDEO = {
    "wan": Entry("WanTransformer3DModel", _WAN, _latents, {"blocks": 3}),
    "wan_vace": Entry(
        "WanVACETransformer3DModel",
        {**_WAN, "num_layers": 4, "vace_layers": [0, 2], "vace_in_channels": 8},
        lambda s: {**_latents(s), "control_hidden_states": noise("control", 0, 1, 8, 2, 8, 8)},
        {"blocks": 4},
    ),
    "skyreels_v2": Entry("SkyReelsV2Transformer3DModel", _WAN, _latents, {"blocks": 3}),
    "hunyuan_video": Entry(
        "HunyuanVideoTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 2,
            "num_single_layers": 3, "num_refiner_layers": 2, "patch_size": 2, "patch_size_t": 1, "guidance_embeds": True,
            "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4),
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 4, 2, 8, 8),
            "timestep": time(s, torch.int64),
            "encoder_hidden_states": noise("text", 0, 1, 6, 16),
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
            "pooled_projections": noise("pooled", 0, 1, 8),
            "guidance": torch.tensor([6000.0]),
        },
        {"transformer_blocks": 2, "single_transformer_blocks": 3},
        _TEXT_AND_VIDEO,
    ),
    "cogvideox": Entry(
        "CogVideoXTransformer3DModel",
        COGVIDEOX,
        lambda s: {
            "hidden_states": noise("x", s, 1, 2, 4, 8, 8),
            "encoder_hidden_states": noise("text", 0, 1, 6, 8),
            "timestep": time(s, torch.int64),
        },
        {"transformer_blocks": 3},
        _TEXT_AND_VIDEO,
    ),
    "cogvideox15": Entry(
        "CogVideoXTransformer3DModel",
        {**COGVIDEOX, "sample_frames": 8, "patch_size_t": 2, "use_rotary_positional_embeddings": True, "patch_bias": False},
        lambda s: {
            "hidden_states": noise("x", s, 1, 2, 4, 8, 8),
            "encoder_hidden_states": noise("text", 0, 1, 6, 8),
            "timestep": time(s, torch.int64),
            "image_rotary_emb": rotary(16, 16),
        },
        {"transformer_blocks": 3},
        _TEXT_AND_VIDEO,
    ),
    "ltx": Entry(
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 12,
            "cross_attention_dim": 24, "num_layers": 3, "caption_channels": 16,
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 32, 8),
            "encoder_hidden_states": noise("text", 0, 1, 6, 16),
            "timestep": time(s),
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
            "num_frames": 2,
            "height": 4,
            "width": 4,
        },
        {"transformer_blocks": 3},
    ),
    "mochi": Entry(
        "MochiTransformer3DModel",
        {
            "patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3, "pooled_projection_dim": 16,
            "in_channels": 4, "text_embed_dim": 16, "time_embed_dim": 4, "max_sequence_length": 6,
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 4, 2, 8, 8),
            "timestep": time(s),
            "encoder_hidden_states": noise("text", 0, 1, 6, 16),
            "encoder_attention_mask": torch.tensor([[True, True, True, True, False, False]]),
        },
        {"transformer_blocks": 3},
        _TEXT_AND_VIDEO,
    ),
    "latte": Entry(
        "LatteTransformer3DModel",
        {
            "sample_size": 8, "num_layers": 2, "patch_size": 2, "attention_head_dim": 4, "num_attention_heads": 2,
            "caption_channels": 16, "in_channels": 4, "cross_attention_dim": 8, "out_channels": 8, "attention_bias": True,
            "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False, "norm_eps": 1e-6, "video_length": 2,
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 4, 2, 8, 8),
            "timestep": time(s, torch.int64),
            "encoder_hidden_states": noise("text", 0, 1, 5, 16),
        },
        {"transformer_blocks": 2, "temporal_transformer_blocks": 2},
        in_turn=True,
        continued=lambda streams: (streams[0].transpose(0, 1),),
    ),
    "allegro": Entry(
        "AllegroTransformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "num_layers": 3,
            "cross_attention_dim": 24, "sample_width": 8, "sample_height": 8, "sample_frames": 2, "caption_channels": 16,
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 4, 2, 8, 8),
            "timestep": time(s, torch.int64),
            "encoder_hidden_states": noise("text", 0, 1, 1, 5, 16),
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0]]),
            "attention_mask": torch.ones(1, 2, 8, 8),
            "image_rotary_emb": (
                tuple(rotary(4, 4) for _ in range(3)),
                tuple(place.reshape(1, 32) for place in torch.meshgrid(torch.arange(2), torch.arange(4), torch.arange(4), indexing="ij")),
            ),
        },
        {"transformer_blocks": 3},
    ),
}  # fmt: skip
