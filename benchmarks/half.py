"""Models in half precision, as diffusers loads them."""

from __future__ import annotations

import torch
from torch import nn


def halved(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast a model in place, but for the modules that its class keeps in float32."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or []
    for path, module in model.named_modules():
        if not any(part in path.split(".") for part in kept):
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if tensor.dtype == torch.float32 and name not in kept:
                    cast = tensor.detach().to(dtype)
                    setattr(module, name, nn.Parameter(cast, requires_grad=False) if isinstance(tensor, nn.Parameter) else cast)
    return model
