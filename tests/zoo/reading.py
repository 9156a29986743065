"""Models that read masks or positions in Python, or whose blocks take as many tokens as a mask says.

The values are built in, and others have programs of their own.
"""

from __future__ import annotations

import torch

from tests.zoo.entry import Entry, noise, time
from tests.zoo.video import VIDEO

HUNYUAN = VIDEO["hunyuan_video"]

READING = {
    "lumina2": Entry(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 3, "num_refiner_layers": 1,
            "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16, "axes_dim_rope": (4, 4, 4), "axes_lens": (32, 32, 32),
            "cap_feat_dim": 16,
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 4, 8, 8),
            "timestep": torch.tensor([0.1 + 0.05 * s]),
            "encoder_hidden_states": noise("text", 0, 1, 5, 16),
            "encoder_attention_mask": torch.tensor([[True, True, True, True, False]]),
        },
        {"layers": 3},
        warned={"residual": "noise_refiner"},
    ),
    "hunyuan_video_framepack": Entry(
        "HunyuanVideoFramepackTransformer3DModel",
        {**HUNYUAN.config, "has_image_proj": True, "image_proj_dim": 8, "has_clean_x_embedder": True},
        lambda s: {
            **HUNYUAN.inputs(s),
            "image_embeds": noise("image", 0, 1, 3, 8),
            "latents_clean": noise("clean", 0, 1, 4, 1, 8, 8),
            "indices_latents_clean": torch.arange(1),
            "latents_history_2x": noise("history", 0, 1, 4, 2, 8, 8),
            "indices_latents_history_2x": torch.arange(2),
            "latents_history_4x": noise("older", 0, 1, 4, 4, 8, 8),
            "indices_latents_history_4x": torch.arange(4),
            "indices_latents": torch.arange(2),
        },
        HUNYUAN.stacks,
        HUNYUAN.streams,
        slice(21, 53),
    ),
}  # fmt: skip

# not in the zoo: running the model itself replaces a buffer, which a cached model over the same weights takes for a change
OMNIGEN = Entry(
    "OmniGenTransformer2DModel",
    {
        "in_channels": 4, "patch_size": 2, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 32, "num_layers": 3, "pad_token_id": 0, "vocab_size": 64, "time_step_dim": 16,
        "rope_scaling": {"long_factor": [1.0] * 4, "short_factor": [1.0] * 4}, "pos_embed_max_size": 16,
    },
    lambda s: {
        "hidden_states": noise("x", s, 1, 4, 8, 8),
        "timestep": time(s) / 1000,
        "input_ids": torch.arange(5).view(1, 5),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(1, 22, 22, dtype=torch.int64),
        "position_ids": torch.arange(22).view(1, 22),
    },
    {"layers": 3},
)  # fmt: skip
