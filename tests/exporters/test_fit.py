"""What ONNX takes less of than torch: each form is rewritten, and computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.nn import functional

import bwcache_compile as bw
from bwcache_compile.exporters.onnx.complex_pairs import complex_as_pairs
from tests.exporters.helpers import CONFIG
from tests.models import OneStream, noise


class Applied(nn.Module):
    """A function of a real and a complex tensor as a module with a complex weight."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("weight", torch.complex(noise("a", 0, 3, 4), noise("b", 0, 3, 4)))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.function(x, z, self.weight)


def real(z: Tensor) -> Tensor:
    return torch.view_as_real(z)


def written(z: Tensor, w: Tensor) -> Tensor:
    """Rows and numbers of one tensor written to zeros."""
    out = torch.zeros(3, 4, dtype=z.dtype)
    out[:2] = w[1:]
    out[1, :3] = z[2, 1:]
    out[torch.tensor([0, 2]), torch.tensor([1, 0])] = z[0, :2]
    return out


def overwritten(z: Tensor, x: Tensor) -> Tensor:
    out = z * 2
    out[0] = x[1]
    out[1:, 2:] = x[1:, :2]
    return out + torch.zeros(3, 4, dtype=z.dtype).copy_(x)


COMPLEX: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "rotary": lambda x, z, w: real(torch.view_as_complex(x.reshape(3, 2, 2)) * z[:, :2]).flatten(1) + x,
    "polar": lambda x, z, w: real(torch.polar(x.abs(), x) * w + torch.complex(x, x)),
    "numbers": lambda x, z, w: real(torch.exp(1j * x) * 2 - z * (1 + 2j)),
    "real factors": lambda x, z, w: real(x * z / x.abs() + z * 3 - w / 2),
    "conjugate": lambda x, z, w: real(-z.conj() * w) + z.abs().unsqueeze(-1),
    "parts": lambda x, z, w: z.real * w.imag,
    "moves": lambda x, z, w: real(torch.cat([z.T, w.transpose(-1, -2)], -1)[1:].unsqueeze(-2).expand(3, 2, 6).reshape(6, -1)),
    "more moves": lambda x, z, w: real(torch.stack([w[torch.tensor([2, 0])], z[..., :2, :].flip(-1)], -1).permute(-1, 0, 1).squeeze()),
    "pieces": lambda x, z, w: real(torch.nn.utils.rnn.pad_sequence(list(z.split([1, 2])), True).repeat(2, 1, 1).select(-1, 0)),
    "picked": lambda x, z, w: real(torch.gather(z, -1, torch.tensor([[0, 2], [1, 1]])) * written(z, w)[:2, :2]),
    "real operands": lambda x, z, w: real(torch.cat([z + x, x - w, w + w]) * torch.stack([x.double(), z]).to(z.dtype)[:1, :1, :1]),
    "real numbers written": lambda x, z, w: real(overwritten(z, x)),
    "padded": lambda x, z, w: real(functional.pad(z, (1, 0)).clone().to(torch.complex128).unbind(-1)[1]),
}


@pytest.mark.parametrize("name", list(COMPLEX))
def test_complex_numbers_become_pairs(name: str) -> None:
    inputs = noise("x", 0, 3, 4), torch.complex(noise("c", 0, 3, 4), noise("d", 0, 3, 4))
    module = Applied(COMPLEX[name])
    program = complex_as_pairs(torch.export.export(module, inputs))
    assert not any(node.meta["val"].is_complex() for node in program.graph.nodes if isinstance(node.meta.get("val"), Tensor))
    actual = program.module()(inputs[0], real(inputs[1]))
    torch.testing.assert_close(actual, module(*inputs), rtol=1e-5, atol=1e-6)


def test_what_has_no_real_form_is_refused() -> None:
    inputs = noise("x", 0, 3, 4), torch.complex(noise("c", 0, 3, 4), noise("d", 0, 3, 4))
    messages = []
    for function in (
        lambda x, z, w: real(z.tan()),
        lambda x, z, w: real(functional.pad(z, (1, 0), value=1.0)),
        lambda x, z, w: (x + 1).copy_(z),
    ):
        with pytest.raises(bw.ExportError) as refusal:
            complex_as_pairs(torch.export.export(Applied(function), inputs))
        messages.append(str(refusal.value))
    assert_expected_inline(
        "\n".join(messages),
        """\
tan applies aten.tan.default to complex numbers, which ONNX does not support and which cannot be rewritten for real ones.
  Write it with real and imaginary parts; products, sums and reshapes are rewritten automatically.
pad applies aten.pad.default to complex numbers, which ONNX does not support and which cannot be rewritten for real ones.
  Write it with real and imaginary parts; products, sums and reshapes are rewritten automatically.
copy applies aten.copy.default to complex numbers, which ONNX does not support and which cannot be rewritten for real ones.
  Write it with real and imaginary parts; products, sums and reshapes are rewritten automatically.""",
    )


class Attending(nn.Module):
    """Attention in the forms that people write: no heads, one row of mask for all queries, grouped heads, causal, windows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, temb: Tensor, turns: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x * temb).chunk(3, dim=-1))
        q = torch.view_as_real(torch.view_as_complex(q.unflatten(-1, (-1, 2)).contiguous()) * turns).flatten(-2)
        seen = torch.arange(x.shape[1], device=x.device) > 0
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen.view(1, 1, 1, -1), enable_gqa=True)
        out = out + functional.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)
        out = out + functional.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(x.shape[1], 1), scale=0.3)
        windows = [part.unflatten(2, (-1, 3)).transpose(1, 2) for part in (q, k, v)]
        out = out + functional.scaled_dot_product_attention(*windows, attn_mask=seen.view(-1, 1, 1, 3)).transpose(1, 2).flatten(2, 3)
        out = out.transpose(1, 2).flatten(2)
        return x + self.out(out + functional.scaled_dot_product_attention(x, x, out, is_causal=True))


class Turning(OneStream):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attending(8) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor, turns: Tensor) -> Tensor:
        places = torch.einsum("n,d->nd", torch.arange(x.shape[1]), torch.linspace(0, 1, 8, dtype=torch.float64))
        x, temb = self.patch(x) + places.sin().float(), self.embed(t)
        x = x.scatter_reduce(1, torch.zeros_like(x[:, :2], dtype=torch.int64), x[:, 1:3], "mean")
        for block in self.blocks:
            x = block(x, temb, turns)
        return self.head(x)


@pytest.fixture(scope="module")
def turning() -> bw.CachedModel:
    turns = torch.polar(torch.ones(6, 2), noise("turns", 0, 6, 2))
    return bw.transform(Turning().eval(), CONFIG, example_args=(*OneStream().example(batch=2), turns), dynamic_shapes="auto")


@pytest.mark.slow
@pytest.mark.parametrize("opset", [20, 23])
def test_attention_and_complex_inputs(turning: bw.CachedModel, opset: int, tmp_path: Path) -> None:
    """One program, exported at both operator sets, run at another size."""
    manifest = bw.export(turning, tmp_path / "bundle", opset=opset)
    assert manifest.self_check["largest_error"] < 1e-5
    operators = [node.op_type for node in onnx.load(tmp_path / "bundle" / "compute.onnx").graph.node]
    assert operators.count("Attention") == (15 if opset == 23 else 0)
    session = bw.load(tmp_path / "bundle")
    x, t, turns = noise("x", 0, 3, 9, 4), torch.ones(3), torch.polar(torch.ones(9, 2), noise("turns", 0, 9, 2))
    turning.reset()
    with torch.no_grad():
        expected = turning(x, t, turns).numpy()
    np.testing.assert_allclose(session(x, t, turns.numpy()), expected, rtol=1e-4, atol=1e-5)
    session.reset()
    np.testing.assert_allclose(session(x, t, turns), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(bw.StateError, match="turns must have dtype complex64, got float32"):
        session(x, t, x.numpy())


class MixedNorm(OneStream):
    """Half-precision features under a normalization whose parameters stayed in float32, as torch takes them."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(self.norm(x.to(torch.bfloat16)).float(), t)


def test_a_layer_norm_with_parameters_of_another_dtype(tmp_path: Path) -> None:
    model = MixedNorm().eval()
    cached = bw.transform(model, CONFIG, example_args=model.example())
    assert bw.export(cached, tmp_path / "bundle").self_check["largest_error"] < 1e-2
    operators = onnx.load(tmp_path / "bundle" / "compute.onnx").graph.node
    assert any(node.op_type == "LayerNormalization" for node in operators)
    session = bw.load(tmp_path / "bundle")
    actual = session(*(value.numpy() for value in model.example()))
    with torch.no_grad():
        np.testing.assert_allclose(actual, model(*model.example()).numpy(), rtol=0, atol=2e-2)
