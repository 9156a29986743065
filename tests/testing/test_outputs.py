"""assert_same_outputs: over several steps, bit for bit; what differs is named."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

import bwcache_compile as bw
from bwcache_compile.testing import assert_same_outputs
from tests.exporters.helpers import Exported
from tests.models import Exposed, OneStream, noise

CALLS = [OneStream().example(step=step) for step in range(6)]


def failing(model: Any, cached: Any, calls: Any = CALLS, **options: Any) -> str:
    with pytest.raises(AssertionError) as error:
        assert_same_outputs(model, cached, calls, **options)
    return str(error.value)


def test_a_threshold_of_zero_is_the_model_bit_for_bit() -> None:
    model = Exposed(depth=2).eval()
    cached = bw.transform(model, threshold=0, num_steps=6)
    assert_same_outputs(model, cached, CALLS)
    assert_same_outputs(model, cached, [{"x": x, "t": t} for x, t in CALLS])
    assert_same_outputs(model, cached, [((x,), {"t": t}) for x, t in CALLS])
    cached.configure(num_steps=None)
    assert_same_outputs(model, cached, CALLS, num_steps=6)


def test_a_reused_step_is_named() -> None:
    model = OneStream(depth=2).eval()
    message = failing(model, bw.transform(model, threshold=math.inf, num_steps=6))
    first, second, third = message.splitlines()
    assert first.startswith("step 2: the output output differs by up to 0.")
    assert second.endswith("24 of 24 values differ.")
    assert third == "  CachedModel reused this step."


@dataclasses.dataclass
class Out:
    sample: Tensor
    more: tuple[Tensor, Any] | None = None


class Returns(nn.Module):
    def __init__(self, *outputs: Any) -> None:
        super().__init__()
        self.outputs = list(outputs)

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return self.outputs.pop(0)


@pytest.mark.parametrize(("wrong", "message"), [
    (Out(torch.tensor([1.0, 2.0]), (torch.tensor([[1, 5]]), True)),
     "step 1: the output more_0 differs by up to 3 at [0, 1], where 5 is returned and 2 expected.\n  That is 1.5 of its largest value;"
     " the tolerance is 0. 1 of 2 values differ."),
    (Out(torch.tensor([1.0, math.nan]), (torch.tensor([[1, 2]]), True)),
     "step 1: the output sample differs by up to inf at [1], where nan is returned and 2 expected.\n  That is inf of its largest"
     " value; the tolerance is 0. 1 of 2 values differ."),
    (Out(torch.tensor([1.0]), (torch.tensor([[1, 2]]), True)),
     "step 1: the output sample is torch.float32 [1], expected torch.float32 [2]."),
    (Out(torch.tensor([1.0, 2.0]), (torch.tensor([[1, 2]]), "no")), "step 1: the output more_1 is 'no', expected True."),
    (Out(torch.tensor([1.0, 2.0])), "step 1: expected the outputs sample, more_0, more_1, got sample."),
])  # fmt: skip
def test_the_output_and_the_place_are_named(wrong: Out, message: str) -> None:
    right = Out(torch.tensor([1.0, 2.0]), (torch.tensor([[1, 2]]), True))
    assert failing(Returns(right, right), Returns(right, wrong), CALLS[:2]) == message


def test_a_tolerance_is_relative_to_the_largest_value() -> None:
    right, close = torch.tensor([1000.0, 1.0]), torch.tensor([1000.0, 1.5])
    assert_same_outputs(Returns(right), Returns(close), CALLS[:1], tolerance=1e-3)
    assert "That is 0.0005 of its largest value; the tolerance is 0.0001." in failing(
        Returns(right), Returns(close), CALLS[:1], tolerance=1e-4
    )


def test_a_session_beside_its_model(exported: Exported) -> None:
    calls = [(noise("x", step, 2, 6, 4), torch.full((2,), 1 - step / 8)) for step in range(8)]
    assert_same_outputs(exported.cached, bw.load(exported.folder), calls, tolerance=1e-4)
    ort = bw.load(exported.folder, outputs="ortvalue")
    assert_same_outputs(exported.cached, ort, calls, tolerance=1e-4)
    ort.configure(threshold=0.0)
    assert "Session computed this step" in failing(exported.cached, ort, calls, tolerance=1e-4)


def test_nothing_to_compare_is_refused() -> None:
    model = OneStream().eval()
    with pytest.raises(bw.ConfigError) as empty:
        assert_same_outputs(model, model, [])
    with pytest.raises(bw.ConfigError) as wrong:
        assert_same_outputs(model, model, [torch.zeros(1)])
    assert_expected_inline(
        f"{empty.value}\n{wrong.value}",
        """\
calls is empty, so nothing would be compared.
calls[0] must be a tuple of arguments, a dictionary of them by name, or a pair of both, got tensor([0.]).""",
    )
