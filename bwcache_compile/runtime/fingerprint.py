"""Naming a model by its class, dtype and weights, so that what was made for one is not used with another."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import ConfigError, StateError

_SAMPLE = 64
"""Values that are read of each weight."""


def fingerprint(model: nn.Module) -> str:
    """Return a hash over the names, shapes and dtypes of a model's weights, and over a sample of their values.

    Raises:
        ConfigError: A weight has no values here.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda pair: pair[0]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.is_meta:
            raise ConfigError(
                f"{name} of {type(model).__name__} is on the meta device, where an offload hook leaves it between calls, so the model"
                " cannot be told from others. Calibrate before the weights are offloaded; configure with calibrated_for=None after it."
            )
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // _SAMPLE)][:_SAMPLE]
        values = torch.view_as_real(sample) if sample.is_complex() else sample
        digest.update(repr(values.double().cpu().tolist()).encode())
    return digest.hexdigest()[:32]


def model_identity(model: nn.Module) -> str:
    """Return the class, the dtype of the first parameter and the fingerprint of a model: `Model, float32, weights 0f3a...`."""
    first = next(model.parameters(), None)
    dtype = "no parameters" if first is None else str(first.dtype).removeprefix("torch.")
    return f"{type(model).__name__}, {dtype}, weights {fingerprint(model)}"


def check_calibrated(model: nn.Module, config: CacheConfig) -> None:
    """Refuse settings that were calibrated for another model.

    Raises:
        StateError: They were.
        ConfigError: A weight of the model has no values here.
    """
    if config.calibrated_for is None:
        return
    found = model_identity(model)
    if found != config.calibrated_for:
        raise StateError(
            f"these settings were calibrated for {config.calibrated_for}, but the model is {found}. Calibrate this model, or set"
            " calibrated_for=None to use them as they are."
        )
