"""Models that cannot be captured as one graph, or cannot be cached, and the evidence that the refusal gives."""

from __future__ import annotations

import torch

from tests.zoo.entry import Entry, noise, time
from tests.zoo.video import COGVIDEOX

REFUSED = {
    "cogvideox_other_size": Entry(
        "CogVideoXTransformer3DModel",
        COGVIDEOX,
        lambda s: {
            "hidden_states": noise("x", s, 1, 3, 4, 8, 8),
            "encoder_hidden_states": noise("text", 0, 1, 6, 8),
            "timestep": time(s, torch.int64),
        },
        {"transformer_blocks": 3},
        never_captured="fake tensor in the exported program constant's list",
    ),
    "hunyuan_video_framepack": Entry(
        "HunyuanVideoFramepackTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 2,
            "num_single_layers": 3, "num_refiner_layers": 2, "patch_size": 2, "patch_size_t": 1, "guidance_embeds": True,
            "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4), "has_image_proj": True,
            "image_proj_dim": 8, "has_clean_x_embedder": True,
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 4, 2, 8, 8),
            "timestep": time(s, torch.int64),
            "encoder_hidden_states": noise("text", 0, 1, 6, 16),
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
            "pooled_projections": noise("pooled", 0, 1, 8),
            "image_embeds": noise("image", 0, 1, 3, 8),
            "latents_clean": noise("clean", 0, 1, 4, 1, 8, 8),
            "indices_latents_clean": torch.arange(1),
            "latents_history_2x": noise("history", 0, 1, 4, 2, 8, 8),
            "indices_latents_history_2x": torch.arange(2),
            "latents_history_4x": noise("older", 0, 1, 4, 4, 8, 8),
            "indices_latents_history_4x": torch.arange(4),
            "indices_latents": torch.arange(2),
            "guidance": torch.tensor([6000.0]),
        },
        {"transformer_blocks": 2, "single_transformer_blocks": 3},
        never_captured="has a size that depends on the values of a tensor",
    ),
}  # fmt: skip
