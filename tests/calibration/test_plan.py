"""A plan: choosing an entry, saving it, and refusing what it was not made for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import bwcache_compile as bw
from bwcache_compile.calibration import PlanEntry, Provenance
from bwcache_compile.calibration.plan import MARGIN
from bwcache_compile.calibration.rules import rule_table
from bwcache_compile.runtime.fingerprint import model_identity
from tests.calibration.helpers import Denoiser


def entry(mask: tuple[bool, ...], psnr: float, fewer: float | None = None) -> PlanEntry:
    return PlanEntry(mask, tuple(map(tuple, rule_table("linear", mask, 2))), psnr, "linear", fewer)


def plan(model: Denoiser) -> bw.CalibrationPlan:
    entries = (entry((True, False, True, True), 40.0), entry((True, False, False, True), 30.0, 31.5))
    made = Provenance(
        model_identity(model),
        (900.0, 600.0, 300.0, 100.0),
        (0, 1, 2, 3),
        4,
        ("cond", "uncond"),
        ((0, "cond"), (0, "uncond")),
        "output",
        2**19,
        "known",
        1,
        3.5,
        {"torch": "2"},
    )
    return bw.CalibrationPlan(entries, made)


def test_a_plan_is_printed_as_a_frontier() -> None:
    assert str(plan(Denoiser())) == (
        "calibration of Denoiser for 4 steps, 2 anchors at the output (0.50 MiB), 1 prompt; known\n"
        " computed  speed-up      PSNR  fewer steps  weights  steps (# computed, . reused)\n"
        "        3     1.33x   40.0 dB               linear   #.##\n"
        "        2     2.00x   30.0 dB      31.5 dB  linear   #..#  advice: run 2 plain steps instead"
    )


def test_weights_that_amplify_noise_are_named() -> None:
    made = plan(Denoiser())
    large = dataclasses.replace(made.entries[1], weights=((0.0, 0.0), (1.0, 0.0), (7.5, -6.5), (0.0, 0.0)))
    assert large.amplification == (pytest.approx(9.92, abs=0.01), 2)
    assert "warning" not in str(made)
    assert str(dataclasses.replace(made, entries=(made.entries[0], large))).endswith(
        "\nwarning: with 2 computed steps the weights of step 2 have norm 9.9: they amplify noise in the anchors, such as rounding to half"
        " precision, by that factor. Use fewer anchors, or compute more steps."
    )


def test_targets() -> None:
    made = plan(Denoiser())
    best, fast = made.entries
    assert made.entry(budget=0.75) is best
    assert made.entry(budget=0.51) is fast
    assert made.entry(psnr=29) is fast
    assert made.entry(psnr=35) is best
    assert made.entry(speedup=1.2) is best
    assert made.entry(speedup=1.5) is fast
    with pytest.raises(bw.ConfigError, match=r"^pass exactly one of budget, psnr and speedup, got none\.$"):
        made.entry()
    with pytest.raises(bw.ConfigError, match=r"got budget, psnr\.$"):
        made.entry(budget=0.5, psnr=30)


def test_what_cannot_be_reached_gets_the_nearest_entry_and_the_frontier() -> None:
    made = plan(Denoiser())
    with pytest.warns(bw.CacheWarning, match=r"no entry of this plan meets psnr=50; the nearest one computes 3 of 4 steps(.|\n)*#\.##"):
        assert made.entry(psnr=50) is made.entries[0]
    with pytest.warns(bw.CacheWarning, match=r"no entry of this plan meets speedup=3; the nearest one computes 2 of 4 steps"):
        assert made.entry(speedup=3) is made.entries[1]
    with pytest.warns(bw.CacheWarning, match=r"no entry of this plan meets budget=0\.1;"):
        assert made.entry(budget=0.1) is made.entries[1]


def test_a_plan_is_saved_and_loaded(tmp_path: Path) -> None:
    made, path = plan(Denoiser()), tmp_path / "plan.json"
    made.save(path)
    assert bw.CalibrationPlan.load(path) == made
    assert list(tmp_path.iterdir()) == [path], "no temporary file is left"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("bwcache-calibration", "other", "is not a calibration plan"),
        ('"version": 3', '"version": 1', r"has plan version 1, but this release reads 3\. Calibrate again\."),
        ('"mask"', '"masks"', "is damaged"),
        ("{", "", "is damaged"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "plan.json"
    plan(Denoiser()).save(path)
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(bw.ConfigError, match=message):
        bw.CalibrationPlan.load(path)


def test_an_entry_as_settings() -> None:
    model = Denoiser()
    config = plan(model).at(0.5)
    assert (config.policy, config.reuse, config.anchors, config.cut) == ("static", "linear", 2, "output")
    assert config.steps_mask == (0, 1, 1, 0)
    assert config.weights == (None, (1.0, 0.0), (1.0, 0.0), None)
    assert config.timesteps == (900.0, 600.0, 300.0, 100.0)
    assert config.calibrated_for == model_identity(model)


def test_an_entry_of_a_model_that_runs_the_last_steps() -> None:
    """The settings count the steps of the generation; at the others another model runs."""
    made = plan(Denoiser())
    made = dataclasses.replace(made, provenance=dataclasses.replace(made.provenance, step_indices=(3, 4, 5, 6), num_steps=7))
    assert "of Denoiser for 4 steps (3 to 6 of 7), 2 anchors" in str(made)
    config = made.at(0.5)
    assert config.steps_mask == (0, 0, 0, 0, 1, 1, 0)
    assert config.weights == (None, None, None, None, (1.0, 0.0), (1.0, 0.0), None)
    assert config.timesteps == (None, None, None, 900.0, 600.0, 300.0, 100.0)
    assert config.policy_values(None)["anchor_steps"][4] == (3.0, -1.0), "what another model computed is no anchor"
    measured = dataclasses.replace(made.entries[1], indicators=(None, None, None, 0.5))
    bounds = dataclasses.replace(made, entries=(measured,)).at(0.5, guarded=True).indicator_bounds
    assert bounds == (None, None, None, None, None, None, 0.5 * MARGIN)


def test_a_model_is_told_by_its_weights() -> None:
    model, other = Denoiser(), Denoiser()
    assert model_identity(model) == model_identity(other)
    with torch.no_grad():
        other.leave.weight.mul_(1.01)
    assert model_identity(model) != model_identity(other)
    assert model_identity(Denoiser().half()).startswith("Denoiser, float16, weights ")
