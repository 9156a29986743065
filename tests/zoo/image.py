"""Image models of one stream."""

from __future__ import annotations

import torch

from tests.zoo.entry import Entry, noise, rotary, time

IMAGE = {
    "dit": Entry(
        "DiTTransformer2DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 3,
            "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 1000, "norm_num_groups": 4,
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 4, 8, 8),
            "timestep": time(s, torch.int64),
            "class_labels": torch.tensor([7]),
        },
        {"transformer_blocks": 3},
    ),
    "pixart": Entry(
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 3,
            "cross_attention_dim": 16, "sample_size": 8, "patch_size": 2, "caption_channels": 8, "norm_num_groups": 4,
            "use_additional_conditions": False,
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 4, 8, 8),
            "encoder_hidden_states": noise("text", 0, 1, 6, 8),
            "timestep": time(s, torch.int64),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        {"transformer_blocks": 3},
    ),
    "sana": Entry(
        "SanaTransformer2DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 3,
            "num_cross_attention_heads": 2, "cross_attention_head_dim": 4, "cross_attention_dim": 8, "caption_channels": 8,
            "sample_size": 8,
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 4, 8, 8),
            "encoder_hidden_states": noise("text", 0, 1, 6, 8),
            "timestep": time(s),
        },
        {"transformer_blocks": 3},
    ),
    "lumina_next": Entry(
        "LuminaNextDiT2DModel",
        {
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 3, "num_attention_heads": 3,
            "num_kv_heads": 1, "multiple_of": 16, "cross_attention_dim": 16,
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 4, 8, 8),
            "timestep": torch.tensor([0.1 + 0.05 * s]),
            "encoder_hidden_states": noise("text", 0, 1, 5, 16),
            "encoder_mask": torch.tensor([[1, 1, 1, 1, 0]]),
            "cross_attention_kwargs": {},
            "image_rotary_emb": torch.polar(torch.ones(8, 8, 4), noise("angle", 0, 8, 8, 4)),
        },
        {"layers": 3},
    ),
    "hunyuan_dit": Entry(
        "HunyuanDiT2DModel",
        {
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 4, "attention_head_dim": 8,
            "num_attention_heads": 2, "cross_attention_dim": 8, "cross_attention_dim_t5": 8, "pooled_projection_dim": 4,
            "hidden_size": 16, "text_len": 4, "text_len_t5": 4, "activation_fn": "gelu-approximate",
            "use_style_cond_and_image_meta_size": False,
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 4, 8, 8),
            "timestep": time(s),
            "encoder_hidden_states": noise("text", 0, 1, 4, 8),
            "text_embedding_mask": torch.ones(1, 4),
            "encoder_hidden_states_t5": noise("words", 0, 1, 4, 8),
            "text_embedding_mask_t5": torch.ones(1, 4),
            "image_rotary_emb": rotary(16, 8),
        },
        {"blocks": 4},
    ),
    "z_image": Entry(
        "ZImageTransformer2DModel",
        {
            "in_channels": 4, "dim": 24, "n_layers": 3, "n_refiner_layers": 2, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 16,
            "axes_dims": [4, 4, 4], "axes_lens": [64, 64, 64],
        },
        lambda s: {
            "x": [noise("x", s, 4, 1, 8, 8)],
            "t": time(s) / 1000,
            "cap_feats": [noise("text", 0, 5, 16)],
        },
        {"layers": 3},
        ("x",),
        warned={"residual": "noise_refiner"},
    ),
    "stable_audio": Entry(
        "StableAudioDiTModel",
        {
            "sample_size": 4, "in_channels": 3, "num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 2,
            "num_key_value_attention_heads": 2, "out_channels": 3, "cross_attention_dim": 4, "time_proj_dim": 8,
            "global_states_input_dim": 8, "cross_attention_input_dim": 4,
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 3, 8),
            "timestep": time(s) / 1000,  # its pipeline gives an angle of sigma, in (0, 1)
            "encoder_hidden_states": noise("text", 0, 1, 5, 4),
            "global_hidden_states": noise("global", 0, 1, 1, 8),
            "rotary_embedding": rotary(9, 4),
        },
        {"transformer_blocks": 3},
    ),
    "prx": Entry(
        "PRXTransformer2DModel",
        {
            "in_channels": 4, "patch_size": 2, "context_in_dim": 16, "hidden_size": 16, "mlp_ratio": 2.0, "num_heads": 2, "depth": 3,
            "axes_dim": [4, 4],
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 4, 8, 8),
            "timestep": time(s) / 1000,
            "encoder_hidden_states": noise("text", 0, 1, 5, 16),
        },
        {"blocks": 3},
    ),
}  # fmt: skip
