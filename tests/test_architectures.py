"""Models in other people's manners: threshold 0 is the model bit for bit, and a reused step keeps what the blocks returned."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bwcache_compile as bw
from bwcache_compile.ir.compare import flat_outputs
from tests.architectures.containers import CONTAINERS
from tests.architectures.inside import INSIDE
from tests.architectures.parts import Model
from tests.architectures.shapes import SHAPES
from tests.architectures.stages import STAGES


@pytest.fixture(scope="module", params=[*CONTAINERS, *SHAPES, *STAGES, *INSIDE], ids=lambda kind: kind.__name__)
def model(request: pytest.FixtureRequest) -> Model:
    torch.manual_seed(0)
    return request.param().eval().requires_grad_(False)


def kept_trunk(model: Model, mask: tuple[int, ...]) -> list[Any]:
    """Run the model by hand: on the steps that reuse, `trunk` returns what it returned on the step before."""
    kept: list[Any] = []
    outputs = []
    original = model.trunk
    for step, reuse in enumerate(mask):
        model.trunk = (lambda *_: kept[-1]) if reuse else (lambda *args: kept.append(original(*args)) or kept[-1])  # type: ignore[method-assign]
        with torch.no_grad():
            outputs.append(flat_outputs(model(*model.inputs(step))))
    del model.trunk
    return outputs


def test_the_cache_is_right(model: Model) -> None:
    mask = (0, 1, 1, 0, 1, 0)
    cached = bw.transform(model, bw.CacheConfig(policy="static", steps_mask=mask))
    if model.refused is not None:
        error, evidence = model.refused
        with pytest.raises(error, match=evidence):
            cached(*model.inputs(0))
        return
    for step, expected in enumerate(kept_trunk(model, mask)):
        with torch.no_grad():
            actual = flat_outputs(cached(*model.inputs(step)))
            whole = flat_outputs(model(*model.inputs(step)))
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True)), f"step {step}"
        if not mask[step]:
            assert all(torch.equal(a, w) for a, w in zip(actual, whole, strict=True))
        else:
            assert not any(torch.allclose(a, w) for a, w in zip(actual, whole, strict=True)), "reuse changes nothing, so this shows nothing"
    assert tuple(block.name for block in cached.plan.blocks) == model.blocks_found
