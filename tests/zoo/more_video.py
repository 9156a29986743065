"""Video models with stacks beside the main one, with several main streams, or with blocks that differ."""

from __future__ import annotations

import torch

from tests.zoo.entry import Entry, noise, rotary, time

MORE_VIDEO = {
    "cosmos": Entry(
        "CosmosTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 3,
            "mlp_ratio": 2, "text_embed_dim": 16, "adaln_lora_dim": 4, "max_size": (4, 16, 16), "patch_size": (1, 2, 2),
            "rope_scale": (2.0, 1.0, 1.0), "concat_padding_mask": False, "extra_pos_embed_type": "learnable",
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 4, 2, 8, 8),
            "timestep": time(s),
            "encoder_hidden_states": noise("text", 0, 1, 5, 16),
            "fps": 30,
        },
        {"transformer_blocks": 3},
    ),
    "easyanimate": Entry(
        "EasyAnimateTransformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 4,
            "text_embed_dim": 16, "num_layers": 4, "mmdit_layers": 2, "sample_width": 8, "sample_height": 8, "patch_size": 2,
            "norm_elementwise_affine": True, "time_position_encoding_type": "3d_rope",
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 4, 2, 8, 8),
            "timestep": time(s),
            "encoder_hidden_states": noise("text", 0, 1, 5, 16),
        },
        {"transformer_blocks": 4},
        ("hidden_states", "encoder_hidden_states"),
    ),
    "kandinsky5": Entry(
        "Kandinsky5Transformer3DModel",
        {
            "in_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 8, "time_dim": 16, "out_visual_dim": 4, "patch_size": (1, 2, 2),
            "model_dim": 24, "ff_dim": 32, "num_text_blocks": 2, "num_visual_blocks": 3, "axes_dims": (4, 4, 4),
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 2, 8, 8, 4),
            "timestep": time(s),
            "encoder_hidden_states": noise("text", 0, 1, 5, 16),
            "pooled_projections": noise("pooled", 0, 1, 8),
            "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
            "text_rope_pos": torch.arange(5),
        },
        {"visual_transformer_blocks": 3},
        ("visual_embed",),
    ),
    "ltx2": Entry(
        "LTX2VideoTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "cross_attention_dim": 24,
            "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": 6,
            "audio_cross_attention_dim": 12, "num_layers": 3, "caption_channels": 16, "rope_double_precision": False,
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 32, 4),
            "audio_hidden_states": noise("audio", s, 1, 6, 4),
            "encoder_hidden_states": noise("text", 0, 1, 5, 16),
            "audio_encoder_hidden_states": noise("words", 0, 1, 5, 16),
            "timestep": time(s),
            "num_frames": 2,
            "height": 4,
            "width": 4,
            "audio_num_frames": 6,
        },
        {"transformer_blocks": 3},
        ("hidden_states", "audio_hidden_states"),
    ),
    "sana_video": Entry(
        "SanaVideoTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 3,
            "num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 16,
            "sample_size": 8, "patch_size": (1, 2, 2), "rope_max_seq_len": 32,
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 4, 2, 8, 8),
            "timestep": time(s),
            "encoder_hidden_states": noise("text", 0, 1, 5, 16),
        },
        {"transformer_blocks": 3},
    ),
    "consisid": Entry(
        "ConsisIDTransformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
            "text_embed_dim": 8, "num_layers": 3, "sample_width": 8, "sample_height": 8, "sample_frames": 8, "patch_size": 2,
            "temporal_compression_ratio": 4, "max_text_seq_length": 6, "use_rotary_positional_embeddings": True,
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 2, 4, 8, 8),
            "encoder_hidden_states": noise("text", 0, 1, 6, 8),
            "timestep": time(s, torch.int64),
            "image_rotary_emb": rotary(32, 16),
        },
        {"transformer_blocks": 3},
        ("hidden_states", "encoder_hidden_states"),
    ),
}  # fmt: skip
