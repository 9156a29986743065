"""Models that cannot be captured as one graph, and the evidence that the refusal gives."""

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
}  # fmt: skip
