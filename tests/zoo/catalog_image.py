"""Image models of the catalog: those of one stream and those of text and image rows."""

from __future__ import annotations

import torch

from tests.zoo.catalog_entry import CatalogEntry
from tests.zoo.entry import noise, time

_PLACES = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
_FLUX = {
    "patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 12,
    "num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (4, 4, 4),
}  # fmt: skip
_FOUR_AXES = {"attention_head_dim": 16, "axes_dims_rope": (4, 4, 4, 4)}


def _tokens(step: int, axes: int = 3) -> dict[str, torch.Tensor]:
    return {
        "hidden_states": noise("x", step, 1, 16, 4),
        "encoder_hidden_states": noise("text", 0, 1, 6, 16),
        "timestep": time(step) / 1000,
        "img_ids": torch.nn.functional.pad(_PLACES, (0, axes - 3)),
        "txt_ids": torch.zeros(6, axes),
    }


CATALOG_IMAGE = {
    "bria_fibo": CatalogEntry(
        "BriaFiboTransformer2DModel",
        {**_FLUX, "text_encoder_dim": 16},
        lambda s: {**_tokens(s), "text_encoder_layers": [noise(f"text{i}", 0, 1, 6, 16) for i in range(5)]},
        {"transformer_blocks": 2, "single_transformer_blocks": 3},
    ),
    "bria_fibo2": CatalogEntry(
        "BriaFibo2Transformer2DModel",
        {
            "in_channels": 4, "patch_size": 2, "dim": 24, "n_layers": 4, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 16,
            "injection_layer_ids": (1, 3), "perceiver_num_layers": 1, "min_num_gist_tokens": 4, "max_num_gist_tokens": 8, "gist_step": 4,
            "gist_min_text_len": 4, "gist_max_text_len": 16, "axes_dims": (4, 4, 4), "axes_lens": (64, 32, 32),
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 4, 8, 8),
            "timestep": time(s) / 1000,
            "encoder_hidden_states": noise("text", 0, 1, 3, 6, 16),
            "encoder_attention_mask": torch.tensor([[True, True, True, True, True, False]]),
        },
        {"layers": 4},
    ),
    "ernie_image": CatalogEntry(
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 24, "num_attention_heads": 2, "num_layers": 3, "ffn_hidden_size": 32, "in_channels": 4, "out_channels": 4,
            "patch_size": 2, "text_in_dim": 16, "rope_axes_dim": (4, 4, 4),
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 4, 8, 8),
            "timestep": time(s),
            "text_bth": noise("text", 0, 1, 5, 16),
            "text_lens": torch.tensor([4]),
        },
        {"layers": 3},
    ),
    "flux2": CatalogEntry(
        "Flux2Transformer2DModel",
        {**_FLUX, **_FOUR_AXES, "timestep_guidance_channels": 16},
        lambda s: {**_tokens(s, 4), "guidance": torch.tensor([3.5])},
        {"transformer_blocks": 2, "single_transformer_blocks": 3},
    ),
    "flux3": CatalogEntry(
        "Flux3Transformer2DModel",
        {
            "in_channels": 4, "cond_in_channels": 4, "num_layers": 2, "num_single_layers": 3, "num_attention_heads": 2,
            "joint_attention_dim": 16, "timestep_channels": 16, **_FOUR_AXES,
        },
        lambda s: _tokens(s, 4),
        {"mode_blocks.image": 2, "single_transformer_blocks": 3},
    ),
    "glm_image": CatalogEntry(
        "GlmImageTransformer2DModel",
        {
            "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
            "text_embed_dim": 16, "time_embed_dim": 8, "condition_dim": 4, "prior_vq_quantizer_codebook_size": 32,
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 4, 8, 8),
            "encoder_hidden_states": noise("text", 0, 1, 5, 16),
            "prior_token_id": torch.arange(16).view(1, 16),
            "prior_token_drop": torch.zeros(1, 16, dtype=torch.bool),
            "timestep": time(s),
            "target_size": torch.tensor([[16, 16]]),
            "crop_coords": torch.tensor([[0, 0]]),
        },
        {"transformer_blocks": 3},
    ),
    "hidream_image": CatalogEntry(
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2, "in_channels": 4, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 12,
            "num_attention_heads": 2, "caption_channels": [16, 16], "text_emb_dim": 8, "num_routed_experts": 2,
            "num_activated_experts": 1, "axes_dims_rope": (4, 4, 4), "max_resolution": (8, 8), "llama_layers": [0, 1, 0, 1, 1],
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 4, 8, 8),
            "timesteps": time(s),
            "encoder_hidden_states_t5": noise("words", 0, 1, 6, 16),
            "encoder_hidden_states_llama3": noise("text", 0, 2, 1, 5, 16),
            "pooled_embeds": noise("pooled", 0, 1, 8),
        },
        {"double_stream_blocks": 2, "single_stream_blocks": 3},
        capture="opaque",
    ),
    "hunyuan_image": CatalogEntry(
        "HunyuanImageTransformer2DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
            "num_single_layers": 3, "num_refiner_layers": 1, "text_embed_dim": 16, "text_embed_2_dim": 16, "rope_axes_dim": (4, 4),
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 4, 4, 4),
            "timestep": time(s),
            "encoder_hidden_states": noise("text", 0, 1, 6, 16),
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
            "encoder_hidden_states_2": noise("glyphs", 0, 1, 4, 16),
            "encoder_attention_mask_2": torch.tensor([[1, 1, 0, 0]]),
        },
        {"transformer_blocks": 2, "single_transformer_blocks": 3},
    ),
    "ideogram4": CatalogEntry(
        "Ideogram4Transformer2DModel",
        {
            "in_channels": 4, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2, "intermediate_size": 32,
            "adaln_dim": 8, "llm_features_dim": 16, "mrope_section": (4, 2, 2),
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 21, 4),
            "timestep": time(s) / 1000,
            "encoder_hidden_states": noise("text", 0, 1, 21, 16),
            "position_ids": torch.arange(21).view(1, 21, 1).expand(1, 21, 3),
            "segment_ids": torch.zeros(1, 21, dtype=torch.int64),
            "indicator": torch.tensor([[3] * 5 + [2] * 16]),
        },
        {"layers": 3},
    ),
    "krea2": CatalogEntry(
        "Krea2Transformer2DModel",
        {
            "in_channels": 4, "num_layers": 3, "attention_head_dim": 12, "num_attention_heads": 2, "num_key_value_heads": 1,
            "intermediate_size": 32, "timestep_embed_dim": 16, "text_hidden_dim": 16, "num_text_layers": 2,
            "text_num_attention_heads": 2, "text_num_key_value_heads": 2, "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1, "axes_dims_rope": (4, 4, 4),
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 16, 4),
            "encoder_hidden_states": noise("text", 0, 1, 6, 2, 16),
            "timestep": time(s) / 1000,
            "position_ids": torch.cat([torch.zeros(6, 3), _PLACES]),
            "encoder_attention_mask": torch.tensor([[True, True, True, True, False, False]]),
        },
        {"transformer_blocks": 3},
    ),
    "longcat_image": CatalogEntry(
        "LongCatImageTransformer2DModel",
        {**_FLUX, "pooled_projection_dim": 8},
        _tokens,
        {"transformer_blocks": 2, "single_transformer_blocks": 3},
    ),
    "ovis_image": CatalogEntry(
        "OvisImageTransformer2DModel",
        {**_FLUX, "out_channels": 4},
        _tokens,
        {"transformer_blocks": 2, "single_transformer_blocks": 3},
    ),
}  # fmt: skip
