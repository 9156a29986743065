"""Quantized weights and activations: the quantized model, bit for bit, and its bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bwcache_compile as bw
from tests.models import OneStream

quantization = pytest.importorskip("torchao.quantization", reason="needs the extra [quantized]")

WEIGHTS = ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig")
ACTIVATIONS = "Int8DynamicActivationInt8WeightConfig"
MASK = (0, 0, 1, 0, 0, 1)


def quantized(kind: str) -> OneStream:
    model = OneStream(depth=3, width=64).eval().requires_grad_(False)
    quantization.quantize_(
        model, getattr(quantization, kind)(), filter_fn=lambda module, name: isinstance(module, nn.Linear) and "blocks" in name
    )
    return model


def pairs() -> list[Any]:
    every = [*((kind, capture) for kind in WEIGHTS for capture in ("whole", "region", "opaque")), (ACTIVATIONS, "opaque")]
    return [pytest.param(*pair, marks=() if pair in every[:1] + every[-1:] else pytest.mark.slow) for pair in every]


@pytest.mark.parametrize(("kind", "capture"), pairs())
def test_computed_steps_are_the_quantized_model_bit_for_bit(kind: str, capture: Any) -> None:
    model = quantized(kind)
    cached = bw.transform(model, policy="static", steps_mask=MASK, capture=capture)
    with torch.no_grad():
        for step, reused in enumerate(MASK):
            args = model.example(2, step)
            assert torch.equal(cached(*args), model(*args)) != bool(reused), step


@pytest.mark.parametrize("kind", [WEIGHTS[0], pytest.param(WEIGHTS[1], marks=pytest.mark.slow)])
def test_a_bundle_holds_the_weights_as_they_are(kind: str, tmp_path: Path) -> None:
    model = quantized(kind)
    cached = bw.transform(model, policy="static", steps_mask=MASK, example_args=model.example(2))
    manifest = bw.export(cached, tmp_path / "bundle")
    assert manifest.self_check["largest_error"] < 1e-5
    of_blocks = sum(parameter.numel() for name, parameter in model.named_parameters() if name.startswith("blocks") and parameter.dim() == 2)
    assert of_blocks <= manifest.files["weights.bin"].bytes < 2 * of_blocks, "one byte a weight"


def test_quantized_activations_of_a_whole_graph_are_refused_by_name() -> None:
    model = quantized(ACTIVATIONS)
    with pytest.raises(bw.NoBlocksFoundError, match="no repeated transformer blocks in OneStream"):
        bw.transform(model, policy="static", steps_mask=MASK, example_args=model.example(2))
