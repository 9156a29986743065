"""Video models of the catalog."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.catalog_entry import CatalogEntry
from tests.zoo.entry import noise, rotary, time

_WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
    "text_dim": 16, "freq_dim": 32, "ffn_dim": 32, "num_layers": 3, "cross_attn_norm": True,
}  # fmt: skip


def _text(tokens: int = 5) -> torch.Tensor:
    return noise("text", 0, 1, tokens, 16)


def _video(step: int, *shape: int) -> torch.Tensor:
    return noise("x", step, *(shape or (1, 4, 2, 8, 8)))


def _far(step: int) -> dict[str, Any]:
    """Return the second chunk of two frames, with the keys and values of the first."""
    cached = [
        {"full_cache": noise(f"kept{i}", 0, 2, 1, 2, 32, 12), "compressed_cache": noise(f"old{i}", 0, 2, 1, 2, 8, 12)} for i in range(3)
    ]
    return {
        "hidden_states": _video(step, 1, 2, 4, 8, 8),
        "timestep": time(step).expand(1, 2),
        "r_timestep": time(step + 1).expand(1, 2),
        "encoder_hidden_states": _text(),
        "chunk_partition": [2, 2],
        "kv_cache": cached,
        "kv_cache_flag": {"num_cached_chunks": 1, "is_cache_step": False},
    }


def _animate2(step: int) -> dict[str, Any]:
    """Return two frames, with the keys and values of one reference frame."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    cache = WanAnimate2KVCache(3)
    for i in range(3):
        cache.get(i).store(noise(f"key{i}", 0, 1, 4, 2, 12), noise(f"value{i}", 0, 1, 4, 2, 12))
    return {
        "hidden_states": [_video(step, 4, 2, 4, 4)],
        "timestep": time(step),
        "encoder_hidden_states": [noise("text", 0, 5, 16)],
        "condition_latents": [noise("condition", 0, 4, 2, 4, 4)],
        "kv_cache": cache,
        "kv_cache_mode": "cached",
        "seq_len": 8,
        "reference_grid_sizes": torch.tensor([[1, 2, 2]]),
        "origin_len": 1,
        "origin_area": [32, 32],
    }


CATALOG_VIDEO = {
    "anyflow": CatalogEntry(
        "AnyFlowTransformer3DModel",
        {**_WAN, "rope_max_seq_len": 32},
        lambda s: {
            "hidden_states": _video(s, 1, 2, 4, 8, 8),
            "timestep": time(s).expand(1, 2),
            "r_timestep": time(s + 1).expand(1, 2),
            "encoder_hidden_states": _text(),
        },
        {"blocks": 3},
    ),
    "anyflow_far": CatalogEntry(
        "AnyFlowFARTransformer3DModel",
        {**_WAN, "rope_max_seq_len": 32, "chunk_partition": (2, 2)},
        _far,
        {"blocks": 3},
    ),
    "chronoedit": CatalogEntry(
        "ChronoEditTransformer3DModel",
        {**_WAN, "rope_max_seq_len": 32, "image_dim": 8, "added_kv_proj_dim": 24},
        lambda s: {
            "hidden_states": _video(s),
            "timestep": time(s),
            "encoder_hidden_states": _text(),
            "encoder_hidden_states_image": noise("image", 0, 1, 3, 8),
        },
        {"blocks": 3},
    ),
    "cosmos3_omni": CatalogEntry(
        "Cosmos3OmniTransformer",
        {
            "head_dim": 12, "hidden_size": 24, "intermediate_size": 32, "latent_channel": 4, "num_attention_heads": 2,
            "num_hidden_layers": 3, "num_key_value_heads": 1, "patch_latent_dim": 16, "vocab_size": 64, "rope_axes_dim": (2, 2, 2),
        },
        lambda s: {
            "input_ids": torch.arange(5),
            "text_indexes": torch.arange(5),
            "position_ids": torch.arange(37).expand(3, 37),
            "und_len": 5,
            "sequence_length": 37,
            "vision_tokens": [_video(s)],
            "vision_token_shapes": [(2, 4, 4)],
            "vision_sequence_indexes": torch.arange(5, 37),
            "vision_mse_loss_indexes": torch.arange(5, 37),
            "vision_timesteps": time(s).expand(32),
            "vision_noisy_frame_indexes": [torch.arange(2)],
        },
        {"layers": 3},
    ),
    "helios": CatalogEntry(
        "HeliosTransformer3DModel",
        {**_WAN, "rope_dim": (4, 4, 4)},
        lambda s: {
            "hidden_states": _video(s),
            "timestep": time(s),
            "encoder_hidden_states": _text(),
            "indices_hidden_states": torch.arange(7, 9).view(1, 2),
            "indices_latents_history_short": torch.arange(6, 7).view(1, 1),
            "indices_latents_history_mid": torch.arange(4, 6).view(1, 2),
            "indices_latents_history_long": torch.arange(4).view(1, 4),
            "latents_history_short": noise("short", 0, 1, 4, 1, 8, 8),
            "latents_history_mid": noise("mid", 0, 1, 4, 2, 8, 8),
            "latents_history_long": noise("long", 0, 1, 4, 4, 8, 8),
        },
        {"blocks": 3},
    ),
    "hunyuan_video15": CatalogEntry(
        "HunyuanVideo15Transformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 3,
            "num_refiner_layers": 1, "text_embed_dim": 16, "text_embed_2_dim": 16, "image_embed_dim": 8, "rope_axes_dim": (4, 4, 4),
        },
        lambda s: {
            "hidden_states": _video(s, 1, 4, 2, 4, 4),
            "timestep": time(s),
            "encoder_hidden_states": _text(6),
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
            "encoder_hidden_states_2": noise("glyphs", 0, 1, 4, 16),
            "encoder_attention_mask_2": torch.tensor([[1, 1, 0, 0]]),
            "image_embeds": noise("image", 0, 1, 3, 8),
        },
        {"transformer_blocks": 3},
    ),
    "kandinsky6": CatalogEntry(
        "Kandinsky6Transformer3DModel",
        {
            "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 8, "time_dim": 16, "model_dim": 24, "ff_dim": 32,
            "num_text_blocks": 2, "num_visual_blocks": 3, "axes_dims": (4, 4, 4), "in_audio_dim": 4, "out_audio_dim": 4,
        },
        lambda s: {
            "hidden_states": _video(s, 1, 2, 8, 8, 9),
            "encoder_hidden_states": _text(),
            "pooled_projections": noise("pooled", 0, 1, 8),
            "timestep": time(s),
            "audio_hidden_states": noise("audio", s, 1, 6, 4),
        },
        {"visual_transformer_blocks": 3},
    ),
    "kandinsky6_sr": CatalogEntry(
        "Kandinsky6SRTransformer3DModel",
        {
            "in_visual_dim": 4, "out_visual_dim": 4, "time_dim": 16, "model_dim": 32, "ff_dim": 32, "num_visual_blocks": 3,
            "axes_dims": (4, 6, 6),
        },
        lambda s: {"hidden_states": _video(s, 1, 2, 16, 16, 9), "timestep": time(s)},
        {"visual_transformer_blocks": 3},
    ),
    "minimax_h3": CatalogEntry(
        "MiniMaxH3Transformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 24, "hidden_size": 24, "num_layers": 3, "num_refiner_layers": 1,
            "ffn_dim": 32, "in_channels": 4, "audio_in_channels": 4, "text_dim": 16, "freq_dim": 16, "time_embed_hidden_dim": 24,
            "time_embed_dim": 12, "rope_freq_dim": 4,
        },
        lambda s: {
            "hidden_states": _video(s, 1, 16, 16),
            "audio_hidden_states": noise("audio", s, 1, 6, 4),
            "encoder_hidden_states": _text(),
            "timestep": time(s),
            "timestep_indices": torch.zeros(27, dtype=torch.int64),
            "token_tags": torch.tensor([0] * 5 + [1] * 16 + [2] * 6),
            "position_ids": torch.arange(27).view(27, 1).expand(27, 3),
            "video_indices": torch.arange(5, 21),
            "audio_indices": torch.arange(21, 27),
            "text_indices": torch.arange(5),
        },
        {"transformer_blocks": 3},
    ),
    "motif_video": CatalogEntry(
        "MotifVideoTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2,
            "num_single_layers": 4, "num_decoder_layers": 2, "text_embed_dim": 16, "rope_axes_dim": (4, 4, 4),
        },
        lambda s: {
            "hidden_states": _video(s),
            "timestep": time(s),
            "encoder_hidden_states": _text(),
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0]]),
        },
        {"transformer_blocks": 2, "single_transformer_blocks": 4},
    ),
    "sana_wm": CatalogEntry(
        "SanaWMTransformer3DModel",
        {
            "in_channels": 4, "num_layers": 4, "hidden_size": 32, "num_attention_heads": 2, "softmax_every_n": 2, "linear_head_dim": 16,
            "caption_channels": 16, "chunk_plucker_channels": 4, "chunk_plucker_post_attn_blocks": 4,
        },
        lambda s: {
            "hidden_states": _video(s, 1, 4, 2, 4, 4),
            "timestep": time(s).expand(1, 1, 2),
            "encoder_hidden_states": _text().unsqueeze(1),
            "mask": torch.tensor([[1, 1, 1, 1, 0]]),
            "camera_conditions": torch.cat([torch.eye(4).flatten(), torch.tensor([4.0, 4.0, 2.0, 2.0])]).expand(1, 2, 20),
            "chunk_plucker": noise("rays", 0, 1, 4, 2, 4, 4),
        },
        {"blocks": 4},
        tells_step=True,
    ),
    "sana_wm_refiner": CatalogEntry(
        "SanaWMLTX2RefinerTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "cross_attention_dim": 24,
            "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": 6,
            "audio_cross_attention_dim": 12, "num_layers": 3, "caption_channels": 16,
        },
        lambda s: {
            "hidden_states": _video(s, 1, 32, 4),
            "encoder_hidden_states": _text(),
            "timestep": time(s).expand(1, 32),
            "video_rotary_emb": tuple(table.unsqueeze(0) for table in rotary(32, 24)),
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0]]),
        },
        {"transformer_blocks": 3},
    ),
    "wan_animate": CatalogEntry(
        "WanAnimateTransformer3DModel",
        {
            **_WAN, "in_channels": 12, "latent_channels": 4, "num_layers": 4, "image_dim": 8, "added_kv_proj_dim": 24,
            "rope_max_seq_len": 32, "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}, "motion_encoder_size": 16,
            "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 8, "face_encoder_hidden_dim": 8, "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        lambda s: {
            "hidden_states": _video(s, 1, 12, 3, 4, 4),
            "timestep": time(s),
            "encoder_hidden_states": _text(),
            "encoder_hidden_states_image": noise("image", 0, 1, 3, 8),
            "pose_hidden_states": noise("pose", 0, 1, 4, 2, 4, 4),
            "face_pixel_values": noise("face", 0, 1, 3, 5, 16, 16),
        },
        {"blocks": 4, "face_adapter": 2},
    ),
    "wan_animate2": CatalogEntry(
        "WanAnimate2Transformer3DModel",
        {
            "text_len": 6, "in_dim": 8, "dim": 24, "ffn_dim": 32, "freq_dim": 32, "text_dim": 16, "out_dim": 4, "num_heads": 2,
            "num_layers": 3, "use_img_emb": False,
        },
        _animate2,
        {"blocks": 3},
        capture="opaque",
    ),
}  # fmt: skip
