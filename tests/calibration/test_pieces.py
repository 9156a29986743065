"""Masks, rules, weights, the cut at the output, and how results are compared."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

import bwcache_compile as bw
from bwcache_compile.calibration import OutputCut, masks
from bwcache_compile.calibration.fit import balanced, solve_weights
from bwcache_compile.calibration.quality import psnr
from bwcache_compile.calibration.rules import rule_table, rule_weights


@given(
    st.integers(4, 80).flatmap(lambda steps: st.tuples(st.just(steps), st.integers(2, steps))),
    st.floats(1, 3),
    st.floats(1, 3),
    st.integers(1, 12),
)
def test_masks_compute_exactly_as_many_steps_as_asked(size: tuple[int, int], start: float, end: float, head: int) -> None:
    steps, count = size
    for mask in (masks.dense_ends(count, steps, start, end), masks.head_and_comb(count, steps, head), masks.even(count, steps)):
        assert len(mask) == steps
        assert sum(mask) == count
        assert mask[0]
        assert mask[-1]


def test_masks_are_drawn() -> None:
    assert masks.mask_text(masks.even(4, 10)) == "#..#..#..#"
    assert masks.mask_text(masks.head_and_comb(6, 12, 3)) == "###..#..#..#"
    assert masks.mask_text(masks.probe_mask(10, 4)) == "#...#...##"


def test_moves_change_one_step_and_keep_the_ends() -> None:
    mask = masks.even(5, 17)
    found = masks.moves(mask)
    assert found
    for moved in found:
        assert sum(moved) == sum(mask)
        assert moved[0]
        assert moved[-1]
        assert sum(a != b for a, b in zip(mask, moved, strict=True)) == 2


@pytest.mark.parametrize("budget", [0, -0.1, 1.5])
def test_a_budget_is_a_share(budget: float) -> None:
    with pytest.raises(bw.ConfigError, match=rf"^budgets must be shares of computed steps in \(0, 1\], such as 0\.4, got {budget}\.$"):
        masks.computed_count(budget, 50)


def test_rules() -> None:
    assert rule_weights("hold", [4, 2], 5, 3).tolist() == [1, 0, 0]
    assert rule_weights("linear", [4, 2], 5, 3).tolist() == [1.5, -0.5, 0]
    assert rule_weights("linear", [4], 5, 3).tolist() == [1, 0, 0]
    quadratic = torch.tensor([3.0, -3.0, 1.0], dtype=torch.float64)
    line = torch.tensor([2.0, -1.0, 0.0], dtype=torch.float64)
    assert torch.allclose(rule_weights("damped", [2, 1, 0], 3, 3), 0.4 * quadratic + 0.6 * line)
    assert torch.allclose(rule_weights("damped", [2, 1], 3, 3), 0.4 * line + torch.tensor([0.6, 0, 0], dtype=torch.float64))
    table = rule_table("linear", (True, False, True, False), 2)
    assert table == [[0, 0], [1, 0], [0, 0], [1.5, -0.5]]


def test_weights_are_the_exact_combination_where_there_is_one() -> None:
    candidates = torch.randn(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = torch.tensor([1.7, -0.9, 0.2], dtype=torch.float64)
    prior = torch.tensor([1.5, -0.5, 0.0], dtype=torch.float64)
    assert torch.allclose(solve_weights(candidates, wanted @ candidates, prior, 1e-9), wanted, atol=1e-6)
    assert torch.allclose(solve_weights(candidates, wanted @ candidates, prior, 1e9), prior, atol=1e-6), "the ridge pulls to the prior"
    assert float(solve_weights(candidates, torch.zeros(40, dtype=torch.float64), prior, 1e-3).sum()) == pytest.approx(1)
    assert torch.equal(solve_weights(candidates[:1].expand(3, -1), candidates[0], prior, 1e-3), prior), "equal anchors"


def test_one_clip_does_not_decide_for_all() -> None:
    """Three clips agree on weights, and a fourth that is off by a hundred times as much wants others."""
    generator = torch.Generator().manual_seed(0)
    candidates = torch.randn(3, 40, dtype=torch.float64, generator=generator)
    clips, prior = torch.arange(40) // 10, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    wanted, others = (torch.tensor(w, dtype=torch.float64) for w in ([1.4, -0.5, 0.1], [-60.0, 31.0, 30.0]))
    target = torch.where(clips < 3, wanted @ candidates, others @ candidates)
    alone = solve_weights(candidates, target, prior, 1e-3)
    together = solve_weights(*reversed(balanced(target, candidates, prior, clips)), prior, 1e-3)
    assert float((alone - wanted).norm()) > 10
    assert float((together - wanted).norm()) < 1
    video = torch.randn(4, 3, 8, 8, generator=generator)
    broken = torch.cat([video[:3] + 1e-3, video[3:] * 0])
    assert psnr(broken, video) > 40, "the mean over the clips, not over all numbers"


@dataclasses.dataclass
class Named:
    """Not known to pytree."""

    sample: Tensor


class Returns(nn.Module):
    def __init__(self, form: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.form, self.dtype, self.count = form, dtype, 0

    def forward(self, x: Tensor) -> object:
        self.count += 1
        y = (x * self.count).to(self.dtype)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        forms: dict[str, object] = {
            "tensor": y,
            "tuple": (y, self.count, None),
            "object": Transformer2DModelOutput(sample=y),
            "dictionary": {"sample": y, "aux": [y + 1]},
            "unknown": Named(y),
        }
        return forms[self.form]


def cut_after(form: str, calls: int, anchors: int = 2, dtype: torch.dtype = torch.float32) -> tuple[OutputCut, object, Tensor]:
    cut, x = OutputCut(Returns(form, dtype), anchors), torch.ones(2)
    state = cut.fresh((x,), {})
    for _ in range(calls):
        _, state = cut.compute((x,), {}, state)
    return cut, state, x


def test_a_reused_output_is_the_weighted_sum_in_the_output_form() -> None:
    weights = torch.tensor([1.5, -0.5])
    cut, state, x = cut_after("tensor", 3)
    reused = cut.reuse((x,), {}, state, weights)  # type: ignore[arg-type]
    assert torch.equal(reused, torch.full((2,), 3.5))
    cut, state, x = cut_after("tuple", 3)
    tensor, count, nothing = cut.reuse((x,), {}, state, weights)  # type: ignore[arg-type]
    assert (float(tensor[0]), count, nothing) == (3.5, 3, None)
    cut, state, x = cut_after("object", 3)
    assert float(cut.reuse((x,), {}, state, weights).sample[0]) == 3.5  # type: ignore[arg-type]
    cut, state, x = cut_after("dictionary", 3)
    assert float(cut.reuse((x,), {}, state, weights)["aux"][0][0]) == 4.5  # type: ignore[arg-type]


def test_sums_are_made_in_float32_and_the_dtype_is_kept() -> None:
    cut, state, x = cut_after("tensor", 3, dtype=torch.bfloat16)
    reused = cut.reuse((x,), {}, state, torch.tensor([2.001, -1.001]))  # type: ignore[arg-type]
    assert reused.dtype is torch.bfloat16
    assert float(reused[0]) == 4.0


def test_before_there_are_enough_anchors_the_others_have_no_weight() -> None:
    cut, state, x = cut_after("tensor", 1, anchors=3)
    assert float(cut.reuse((x,), {}, state, torch.tensor([1.0, 0.0, 0.0]))[0]) == 1  # type: ignore[arg-type]


def test_an_output_without_tensors_is_refused() -> None:
    with pytest.raises(bw.ConfigError, match=r"^Returns returned Named without a floating-point tensor"):
        cut_after("unknown", 1)


def test_psnr_takes_what_pipelines_return() -> None:
    a = torch.linspace(0, 1, 100)
    assert psnr(a + 0.1, a) == pytest.approx(20, abs=1e-3)
    assert psnr(2 * a - 1 + 0.2, 2 * a - 1) == pytest.approx(20, abs=1e-3), "values in [-1, 1] have twice the peak"
    assert psnr([np.asarray(a) + 0.1], [np.asarray(a)]) == pytest.approx(20, abs=1e-3)
    assert psnr(10 * a + 1, 10 * a) == pytest.approx(20, abs=1e-3), "latents have their range"
    dark, gray = (Image.new("RGB", (4, 4), (v, v, v)) for v in (0, 51))
    assert psnr([[gray]], [[dark]]) == pytest.approx(20 * math.log10(5), abs=1e-3)
    assert psnr(a, a) == 100
    assert psnr(a * math.nan, a) == -math.inf
    with pytest.raises(bw.ConfigError, match=r"^generate must return the frames, images or latents .*, got str without numbers"):
        psnr("video.mp4", "video.mp4")
    with pytest.raises(bw.ConfigError, match=r"^generate returned 100 elements at first and 50 now\."):
        psnr(a[:50], a)
