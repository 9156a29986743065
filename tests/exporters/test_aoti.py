"""Bundles that AOTInductor compiled, run from Python and from C++."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline

import bwcache_compile as bw
from tests.exporters.helpers import CONFIG, check_beside_torch, opened
from tests.models import OneStream, TwoStream, noise


def test_a_package_is_torch(tmp_path: Path) -> None:
    """Compiled at one size, run at others; sizes that the compiler ruled out are refused instead of computed wrongly."""
    model = OneStream(depth=2).eval()
    cached = bw.transform(model, CONFIG, example_args=(noise("x", 0, 2, 40, 4), torch.ones(2)), dynamic_shapes="auto")
    manifest = bw.export(cached, tmp_path / "bundle", format="aoti")
    assert manifest["self_check"]["largest_error"] < 1e-5
    assert manifest["self_check"]["tolerance"] == 1e-4
    assert manifest["self_check"]["sizes"] == [{"s13": 2, "s27": 40}, {"s13": 6, "s27": 120}]
    session = opened(tmp_path / "bundle")
    for sizes in ((2, 40), (3, 50)):
        check_beside_torch(cached, session, sizes, tolerance=1e-5)
    turned = noise("x", 0, 2, 40, 4).transpose(1, 2).contiguous().transpose(1, 2)  # compiled code takes strides for granted
    session.reset()
    torch.testing.assert_close(session(turned, torch.ones(2)), cached(turned, torch.ones(2)), rtol=1e-5, atol=1e-5)
    with pytest.raises(bw.StateError) as refusal:
        session(torch.zeros(2, 6, 4), torch.ones(2))
    assert_expected_inline(
        "\n".join([*manifest["conditions"], str(refusal.value)]),
        """\
s13 >= 2
s27 >= 2
max(1, (s13*s27) // 32) != 1
max(1, (s13*s27) // 32) >= 2
max(1, (s13*s27) // 32) == max(1, (s13*s27) // 32)
8*max(1, (s13*s27) // 32) <= 4096
the graphs hold where max(1, (s13*s27) // 32) != 1, and here s13 is 2, s27 is 6.""",
    )


@pytest.mark.slow
@pytest.mark.parametrize("config", [
    bw.CacheConfig(policy="static", steps_mask=(0, 1, 0, 1, 1)),
    bw.CacheConfig(num_steps=8, reuse="taylor"),
    bw.CacheConfig(num_steps=8, reuse="residual", indicator_tokens="all"),
], ids=["static", "taylor", "residual"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_of_reuse_compiled(config: bw.CacheConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    model = (OneStream if config.reuse == "residual" else TwoStream)().eval().to(dtype)
    cached = bw.transform(model, config, example_args=tuple(value.to(dtype) for value in model.example()))
    report = bw.export(cached, tmp_path / "bundle", format="aoti")["self_check"]
    assert report["steps"] == {"static": "#.#..", "schedule": "##..#."}[config.policy]
    assert report["largest_error"] < report["tolerance"] == {torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]
