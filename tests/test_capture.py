"""Capture is checked against the model before it is used; what cannot be captured says where and why."""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bwcache_compile as bw
from bwcache_compile.capture.capture import capture
from tests.models import OneStream


class ExportsSomethingElse(OneStream):
    """Traces without an error and computes something else: the trap that strict export has fallen into."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out = super().forward(x, t)
        return out + 1 if torch.compiler.is_exporting() else out


class FillsItselfIn(OneStream):
    """Makes a table at its first call; exported before it ran, it would keep a tensor without data."""

    table: Tensor | None = None

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(0, 1, x.shape[-1])
        return super().forward(x * self.table, t)


class BranchesOnValues(OneStream):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if x.sum().item() > 0:
            x = x * 2
        return super().forward(x, t)


class DrawsNoise(OneStream):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x), t)


def test_a_capture_that_computes_something_else_is_refused() -> None:
    model = ExportsSomethingElse().eval()
    with pytest.raises(bw.CaptureError) as caught:
        bw.transform(model, bw.CacheConfig(num_steps=4), example_args=model.example())
    assert str(caught.value) == (
        "could not capture ExportsSomethingElse as one graph.\n  non-strict: the outputs of the captured graph differ from "
        "the model's: output 0 differs by up to 1\n  strict: the outputs of the captured graph differ from the model's: "
        "output 0 differs by up to 1\n  If the outputs differ by a rounding error, the model selects kernels itself (with "
        "sdpa_kernel, for example), which a graph cannot record: select them around the call, or transform with "
        'verify="close". If they differ by more, torch.export traced the model wrongly: try a size that the model was built '
        "for."
    )


def test_a_model_that_never_ran_is_not_damaged() -> None:
    model, fresh = FillsItselfIn().eval(), FillsItselfIn().eval()
    x, t = model.example()
    bw.transform(model, bw.CacheConfig(num_steps=4), example_args=(x, t))
    with torch.no_grad():
        assert torch.equal(model(x, t), fresh(x, t))


def test_a_branch_on_values_names_its_line() -> None:
    model = BranchesOnValues().eval()
    with pytest.raises(bw.CaptureError) as caught:
        capture(model, model.example(), {})
    message = str(caught.value)
    assert re.search(r'test_capture\.py:\d+, in forward: "if x\.sum\(\)\.item\(\) > 0:"', message)
    assert message.startswith("could not capture BranchesOnValues as one graph.\n  non-strict: ")
    assert "\n  strict: " in message


def test_a_model_that_differs_from_itself_is_named() -> None:
    model = DrawsNoise().eval()
    with pytest.raises(
        bw.CaptureError, match=r"DrawsNoise is not deterministic: two calls with the same inputs differ \(output 0 differs by up to"
    ):
        capture(model, model.example(), {})


class CountsCalls(OneStream):
    calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x, t) * self.calls


def test_a_model_that_counts_its_calls_is_told_so() -> None:
    model = CountsCalls().eval()
    with pytest.raises(
        bw.CaptureError, match=r"not deterministic.*\n.*draws random numbers or .*If it keeps state between calls \(a step counter"
    ):
        capture(model, model.example(), {})


def test_weights_are_shared_by_identity() -> None:
    model = OneStream().eval()
    program = capture(model, model.example(), {})
    held = {id(p) for p in program.compute.parameters()}
    assert held == {id(p) for p in model.parameters()}


def test_a_rotary_table_of_another_size_is_right_or_refused() -> None:
    """CogVideoX recomputes its position embedding at other sizes: strict export once traced that silently wrong."""
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    model: nn.Module = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=8,
        num_layers=2, sample_width=8, sample_height=8, sample_frames=8, patch_size=2, temporal_compression_ratio=4,
        max_text_seq_length=6,
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 2, 4, 4, 4),
        "encoder_hidden_states": torch.randn(1, 6, 8),
        "timestep": torch.tensor([500]),
    }
    cached = bw.transform(model, bw.CacheConfig(num_steps=4, threshold=0))
    with torch.no_grad():
        expected = model(**inputs).sample
        try:
            actual = cached(**inputs).sample
        except bw.CaptureError as error:
            assert "could not capture CogVideoXTransformer3DModel as one graph" in str(error)  # noqa: PT017
        else:
            assert torch.equal(actual, expected)


def _a_little_off(graph: Any, _: Any) -> Any:
    return lambda *args: tuple(out * (1 + 1e-6) for out in graph(*args))


@functools.partial(torch.compile, backend=_a_little_off)
def squashed(x: Tensor) -> Tensor:
    return torch.tanh(x)


class CompilesItself(OneStream):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(squashed(x), t)


def test_functions_that_a_model_compiles_are_captured_uncompiled() -> None:
    model = CompilesItself().eval()
    with pytest.warns(bw.CacheWarning, match=r"^CompilesItself calls torch.compile on functions of its own"):
        program = capture(model, model.example(), {})
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        assert torch.equal(program.compute(*model.example())[0], model(*model.example()))


class CopiesAValue(OneStream):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out = super().forward(x, t)
        if copy.deepcopy(x.mean(dim=(1, 2))).tolist()[0] > 0:
            return out * 2
        return out


def test_a_refusal_names_the_models_own_line_and_the_input_in_each_way() -> None:
    model = CopiesAValue().eval()
    with pytest.raises(bw.CaptureError) as caught:
        capture(model, model.example(), {})
    _, *lines, remedy = str(caught.value).split("\n")
    assert [line.strip().partition(":")[0] for line in lines if line.startswith("  ") and line[2] != " "] == [
        "non-strict",
        "strict",
        "non-strict, what Python reads as constants",
    ]
    at = [line for line in lines if line.startswith("    at ")]
    assert len(at) == 3, "one for each way"
    assert all(re.search(r"at \S*test_capture\.py:\d+, in forward: ", line) for line in at)
    assert lines.count("    which reads values that depend on x") == 2, "Dynamo does not say"
    assert "Remove the data-dependent Python at that line" in remedy


def test_a_size_that_values_decide_names_its_line() -> None:
    class Kept(OneStream):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            kept = x[0, :, 0] > 0
            return super().forward(x[:, kept], t)

    model = Kept().eval()
    with pytest.raises(bw.UnsupportedGraphError) as caught:
        bw.transform(model, bw.CacheConfig(num_steps=4), example_args=model.example())
    assert re.search(r'\n    at \S*test_capture\.py:\d+, in forward: "return super\(\)\.forward\(x\[:, kept\], t\)"\n', str(caught.value))
