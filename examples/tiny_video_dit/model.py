"""The tiny video diffusion transformer: a diffusers Wan model, its weights and its sampler."""

from __future__ import annotations

from pathlib import Path

from data import TOKEN_WIDTH
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

WEIGHTS = Path(__file__).with_name("weights.safetensors")
GUIDANCE = 3.0
SHIFT = 2.0


def build() -> WanTransformer3DModel:
    """Build the model with fresh weights: 12 blocks of width 128 over 256 tokens per clip."""
    return WanTransformer3DModel(
        patch_size=(2, 4, 4),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=3,
        out_channels=3,
        text_dim=TOKEN_WIDTH,
        freq_dim=128,
        ffn_dim=512,
        num_layers=12,
        cross_attn_norm=True,
        rope_max_seq_len=64,
    )


def load() -> WanTransformer3DModel:
    """Load the committed weights (stored in float16) into a float32 model in evaluation mode."""
    model = build()
    model.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    return model.eval().requires_grad_(False)
