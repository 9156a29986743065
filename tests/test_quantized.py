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
    every = [(kind, capture) for kind in (*WEIGHTS, ACTIVATIONS) for capture in ("whole", "region", "opaque")]
    return [pytest.param(*pair, marks=() if pair in (every[0], every[6]) else pytest.mark.slow) for pair in every]


@pytest.mark.parametrize(("kind", "capture"), pairs())
def test_computed_steps_are_the_quantized_model_bit_for_bit(kind: str, capture: Any) -> None:
    model = quantized(kind)
    cached = bw.transform(model, policy="static", steps_mask=MASK, capture=capture)
    with torch.no_grad():
        for step, reused in enumerate(MASK):
            args = model.example(2, step)
            assert torch.equal(cached(*args), model(*args)) != bool(reused), step


@pytest.mark.parametrize("kind", [WEIGHTS[0], pytest.param(WEIGHTS[1], marks=pytest.mark.slow), ACTIVATIONS])
def test_a_bundle_holds_the_weights_as_they_are(kind: str, tmp_path: Path) -> None:
    model = quantized(kind)
    cached = bw.transform(model, policy="static", steps_mask=MASK, example_args=model.example(2))
    manifest = bw.export(cached, tmp_path / "bundle")
    # an activation that lies between two integers may be rounded to the other one elsewhere
    assert manifest.self_check["largest_error"] < (1e-2 if kind == ACTIVATIONS else 1e-5)
    of_blocks = sum(parameter.numel() for name, parameter in model.named_parameters() if name.startswith("blocks") and parameter.dim() == 2)
    assert of_blocks <= manifest.files["weights.bin"].bytes < 2 * of_blocks, "one byte a weight"


def test_files_of_torch_take_unwrapped_weights(tmp_path: Path) -> None:
    model = quantized(ACTIVATIONS)
    given = bw.transform(model, policy="static", steps_mask=MASK, example_args=model.example(2))
    with pytest.raises(bw.ExportError, match=r"is of type Int8Tensor.*call torchao.utils.unwrap_tensor_subclass\(model\)"):
        bw.export(given, tmp_path / "bundle", format="pt2")
    assert not (tmp_path / "bundle").exists()
    unwrap = pytest.importorskip("torchao.utils").unwrap_tensor_subclass
    unwrapped = bw.transform(unwrap(model), policy="static", steps_mask=MASK, example_args=model.example(2))
    assert bw.export(unwrapped, tmp_path / "bundle", format="pt2").self_check["largest_error"] == 0.0


def test_weights_that_multiply_the_noise_of_activations_are_warned_of() -> None:
    model = quantized(ACTIVATIONS)
    row = (1.8, -0.8)  # of norm 1.97
    settings: dict[str, Any] = {"policy": "static", "steps_mask": MASK, "reuse": "linear", "anchors": 2}
    with pytest.warns(bw.CacheWarning, match=r"quantizes its activations \(_int_mm.*by up to 2\.0: images may flicker"):
        cached = bw.transform(model, **settings, weights=(None, None, row, None, None, (1.0, 0.0)), example_args=model.example(2))
    cached.configure(weights=(None, None, (1.2, -0.2), None, None, (1.0, 0.0)))
    with pytest.warns(bw.CacheWarning, match=r"by up to 2\.2: images may flicker"):  # the rule goes on along the line: (2, -1)
        cached.configure(weights=None)
    weights_only = quantized(WEIGHTS[0])
    bw.transform(weights_only, **settings, example_args=weights_only.example(2))  # warns of nothing, which would be an error here
