"""The rest of the catalog: audio, image editing, proteins, and models whose blocks differ from one another."""

from __future__ import annotations

import torch

from tests.zoo.catalog_entry import CatalogEntry
from tests.zoo.entry import noise, time
from tests.zoo.reading import OMNIGEN

_PART = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 8, "num_layers": 3, "norm_num_groups": 4}


def _text(tokens: int = 5) -> torch.Tensor:
    return noise("text", 0, 1, tokens, 16)


CATALOG_MORE = {
    "ace_step": CatalogEntry(
        "AceStepTransformer1DModel",
        {
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 8, "in_channels": 12, "audio_acoustic_hidden_dim": 4, "sliding_window": 4,
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 24, 4),
            "timestep": time(s) / 1000,
            "timestep_r": time(s) / 1000,
            "encoder_hidden_states": _text(),
            "context_latents": noise("context", 0, 1, 24, 8),
        },
        {"layers": 4},
    ),
    "dreamlite": CatalogEntry(
        "DreamLiteTransformer2DModel",
        {**_PART, "cross_attention_dim": 16},
        lambda s: {"hidden_states": noise("x", s, 1, 8, 8, 8), "encoder_hidden_states": _text()},
        {"transformer_blocks": 3},
    ),
    "joyimage_edit": CatalogEntry(
        "JoyImageEditTransformer3DModel",
        {"in_channels": 4, "hidden_size": 24, "num_attention_heads": 2, "text_dim": 16, "num_layers": 3, "rope_dim_list": [4, 4, 4]},
        lambda s: {
            "hidden_states": noise("x", s, 1, 2, 4, 1, 8, 8),
            "timestep": time(s),
            "encoder_hidden_states": _text(),
        },
        {"double_blocks": 3},
    ),
    "joyimage_edit_plus": CatalogEntry(
        "JoyImageEditPlusTransformer3DModel",
        {"in_channels": 4, "hidden_size": 24, "num_attention_heads": 2, "text_dim": 16, "num_layers": 3, "rope_dim_list": [4, 4, 4]},
        lambda s: {
            "hidden_states": noise("x", s, 1, 32, 4, 1, 2, 2),
            "timestep": time(s),
            "encoder_hidden_states": _text(),
            "encoder_hidden_states_mask": torch.tensor([[1, 1, 1, 1, 0]]),
            "shape_list": [[(1, 4, 4), (1, 4, 4)]],
        },
        {"double_blocks": 3},
    ),
    "longcat_audio": CatalogEntry(
        "LongCatAudioDiTTransformer",
        {"dit_dim": 16, "dit_depth": 3, "dit_heads": 2, "dit_text_dim": 16, "latent_dim": 4, "ff_mult": 2.0},
        lambda s: {
            "hidden_states": noise("x", s, 1, 24, 4),
            "encoder_hidden_states": _text(),
            "encoder_attention_mask": torch.tensor([[True, True, True, True, False]]),
            "timestep": time(s) / 1000,
            "latent_cond": noise("condition", 0, 1, 24, 4),
        },
        {"blocks": 3},
        besides=("latent_embed", "latent_cond_embedder"),
    ),
    "minimax_music3": CatalogEntry(
        "MiniMaxMusic3Transformer1DModel",
        {
            "in_channels": 4, "condition_dim": 8, "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8, "ff_inner_dim": 32,
            "rotary_dim": 4, "fourier_embedding_dim": 16,
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 4, 24),
            "timestep": time(s) / 1000,
            "encoder_hidden_states": noise("text", 0, 1, 24, 8),
        },
        {"transformer_blocks": 3},
    ),
    "nucleusmoe_image": CatalogEntry(
        "NucleusMoEImageTransformer2DModel",
        {
            "in_channels": 16, "out_channels": 4, "num_layers": 4, "attention_head_dim": 12, "num_attention_heads": 2,
            "num_key_value_heads": 1, "joint_attention_dim": 16, "axes_dims_rope": (4, 4, 4), "mlp_ratio": 2.0,
            "dense_moe_strategy": "leave_first_block_dense", "num_experts": 4, "moe_intermediate_dim": 16, "capacity_factors": 2.0,
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 16, 16),
            "img_shapes": [(1, 4, 4)],
            "encoder_hidden_states": _text(),
            "encoder_hidden_states_mask": torch.tensor([[1, 1, 1, 1, 0]]),
            "timestep": time(s) / 1000,
        },
        {"transformer_blocks": 4},
        uninitialized=("gate_up_proj", "down_proj"),
    ),
    "omnigen": CatalogEntry(OMNIGEN.model, OMNIGEN.config, OMNIGEN.inputs, OMNIGEN.stacks),
    "prior": CatalogEntry(
        "PriorTransformer",
        {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3, "embedding_dim": 8, "num_embeddings": 5},
        lambda s: {
            "hidden_states": noise("x", s, 1, 8),
            "timestep": time(s),
            "proj_embedding": noise("pooled", 0, 1, 8),
            "encoder_hidden_states": noise("text", 0, 1, 5, 8),
            "attention_mask": torch.tensor([[True, True, True, True, False]]),
        },
        {"transformer_blocks": 3},
    ),
    "qwen_image21": CatalogEntry(
        "QwenImage21Transformer2DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 12, "num_attention_heads": 2,
            "context_in_dim": 16, "axes_dims_rope": (4, 4, 4),
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 16, 4),
            "encoder_hidden_states": _text(6),
            "timestep": time(s) / 1000,
            "img_shapes": [[(1, 4, 4)]],
            "img_mask": torch.tensor([[False] * 6 + [True] * 4]),
            "encoder_hidden_states_mask": torch.ones(1, 6, dtype=torch.int64),
        },
        {"transformer_blocks": 3},
    ),
    "rfd4_proteina": CatalogEntry(
        "RFD4ProteinaTransformer",
        {
            "nlayers": 4, "token_dim": 16, "nheads": 2, "dim_cond": 8, "pair_repr_dim": 8, "latent_dim": 4, "token_type_emb_dim": 4,
            "t_emb_dim": 8, "xt_pair_dist_dim": 6, "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"), "feats_pair_repr": ("xt_bb_ca_pair_dists",),
            "feats_pair_cond": ("time_emb_bb_ca", "time_emb_local_latents"), "tri_mult_c": 8, "num_sequence_classes": 6,
            "update_pair_repr_every_n": 1,
        },
        lambda s: {
            "bb_ca": noise("x", s, 1, 12, 3),
            "local_latents": noise("latents", s, 1, 12, 4),
            "bb_ca_time": 1 - time(s) / 1000,
            "local_latents_time": 1 - time(s) / 1000,
            "padding_mask": torch.ones(1, 12, dtype=torch.bool),
            "token_type": torch.zeros(1, 12, dtype=torch.int64),
            "conditioning": {
                "is_in_context_conditioning": torch.zeros(1, 12, dtype=torch.bool),
                "supports_local_latent": torch.ones(1, 12, dtype=torch.bool),
            },
        },
        {"transformer_layers": 4, "pair_update_layers": 3},
    ),
    "stable_audio3": CatalogEntry(
        "StableAudio3DiTModel",
        {
            "io_channels": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "cond_token_dim": 16, "global_cond_dim": 8,
            "local_add_cond_dim": 3, "timestep_features_dim": 8, "num_memory_tokens": 2,
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 4, 24),
            "timestep": time(s) / 1000,
            "encoder_hidden_states": _text(),
            "global_hidden_states": noise("global", 0, 1, 8),
            "local_add_cond": noise("local", 0, 1, 3, 24),
        },
        {"transformer_blocks": 3},
    ),
    "t5_film": CatalogEntry(
        "T5FilmDecoder",
        {"input_dims": 4, "targets_length": 24, "d_model": 16, "num_layers": 3, "num_heads": 2, "d_kv": 8, "d_ff": 32},
        lambda s: {
            "encodings_and_masks": [(_text(), torch.ones(1, 5))],
            "decoder_input_tokens": noise("x", s, 1, 24, 4),
            "decoder_noise_time": time(s) / 1000,
        },
        {"decoders": 3},
    ),
    "transformer_2d": CatalogEntry(
        "Transformer2DModel",
        {
            **_PART, "sample_size": 8, "patch_size": 2, "out_channels": 8, "norm_type": "ada_norm_zero", "num_embeds_ada_norm": 1000,
            "norm_elementwise_affine": False,
        },
        lambda s: {
            "hidden_states": noise("x", s, 1, 8, 8, 8),
            "timestep": time(s, torch.int64),
            "class_labels": torch.tensor([7]),
        },
        {"transformer_blocks": 3},
    ),
    "transformer_temporal": CatalogEntry(
        "TransformerTemporalModel",
        _PART,
        lambda s: {"hidden_states": noise("x", s, 2, 8, 4, 4), "num_frames": 2},
        {"transformer_blocks": 3},
    ),
}  # fmt: skip
