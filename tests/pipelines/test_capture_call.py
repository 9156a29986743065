"""Recording the arguments of a call, to capture or export with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bwcache_compile as bw
from tests.models import OneStream


def steps(module: nn.Module, x: Tensor, count: int = 3) -> list[Tensor]:
    """Run a loop that writes into its latents in place."""
    outputs = []
    with torch.no_grad():
        for step in range(count):
            outputs.append(module(x, t=torch.full((1,), 1 - step / 4)))
            x -= 0.1 * outputs[-1]
    return outputs


def started() -> Tensor:
    return torch.ones(1, 6, 4)


@pytest.mark.parametrize(
    "wrap", [lambda m: m, bw.transform, lambda m: torch.compile(m, backend="eager")], ids=["plain", "cached", "compiled"]
)
def test_the_first_call_is_recorded_as_it_was(wrap: Any) -> None:
    module = wrap(OneStream().eval())
    plain = steps(module, started())
    with bw.capture_call(module) as call:
        recorded = steps(module, started())
    assert all(map(torch.equal, recorded, plain)), "nothing is stopped or changed"
    (x,) = call.args
    assert list(call.kwargs) == ["t"]
    assert torch.equal(x, started()), "not what the loop made of it later"
    assert torch.equal(call.kwargs["t"], torch.ones(1))
    assert not module._forward_pre_hooks
    steps(module, torch.zeros(1, 6, 4))
    assert torch.equal(call.args[0], started()), "calls after the block are not recorded"


def test_it_gives_the_examples_of_a_transform_and_an_export(tmp_path: Any) -> None:
    model = OneStream().eval()
    with bw.capture_call(model) as call:
        steps(model, started())
    cached = bw.transform(model, num_steps=3, example_args=call.args, example_kwargs=call.kwargs)
    assert len(cached.plan.blocks) == 3
    steps(cached, started())
    assert cached.report().captures == 1, "the loop's own calls are served by it"
    bw.export(cached, tmp_path / "bundle", format="pt2", signature=(call.args, call.kwargs))
    assert (tmp_path / "bundle" / "manifest.json").is_file()


def test_a_block_without_a_call_is_an_error() -> None:
    model = OneStream().eval()
    other = OneStream().eval()
    with (
        pytest.raises(bw.StateError, match=r"^OneStream was not called inside the `with capture_call\(\.\.\.\)` block\."),
        bw.capture_call(model),
    ):
        steps(other, started())
    assert not model._forward_pre_hooks
    with bw.capture_call(model) as call:
        with pytest.raises(bw.StateError, match="was not called"):
            _ = call.args
        steps(model, started())
    with pytest.raises(bw.ConfigError, match=r"^capture_call expects a torch\.nn\.Module, such as pipe\.transformer, got function\.$"):
        bw.capture_call(started)  # type: ignore[arg-type]


def test_an_error_in_the_block_is_not_hidden() -> None:
    model = OneStream().eval()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), bw.capture_call(model) as call:
        steps(model, torch.ones(1, 6, 3))
    assert not model._forward_pre_hooks
    assert torch.equal(call.args[0], torch.ones(1, 6, 3))


def test_the_rest_of_a_run_can_be_left_out() -> None:
    model, reached = OneStream().eval(), []
    with bw.capture_call(model, stop=True) as call:
        try:
            steps(model, started())
        except Exception:
            reached.append("an error handler")
        reached.append("the rest")
    assert reached == []
    assert torch.equal(call.args[0], started())
    assert not model._forward_pre_hooks


def test_what_inference_mode_made_can_be_captured_with() -> None:
    model = OneStream().eval()
    with bw.capture_call(model) as call, torch.inference_mode():
        model(started().expand(2, 6, 4), torch.ones(1).expand(2))
    assert not any(tensor.is_inference() for tensor in call.args)
    assert len(bw.transform(model, example_args=call.args).plan.blocks) == 3


def test_an_expanded_tensor_keeps_its_layout() -> None:
    model = OneStream().eval()
    with bw.capture_call(model) as call, torch.no_grad():
        model(started().expand(2, 6, 4), torch.ones(1))
    assert call.args[0].stride() == (0, 4, 1)
