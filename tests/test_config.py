"""Every setting out of range has a message; what is saved is what is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bwcache_compile as bw

STEPS = "it must be an int >= 1. For a fraction of the steps set reuse_fraction."
FRACTION = "it must be in (0, 1]. For a number of steps set reuse_interval."
GOLDEN: list[tuple[dict[str, Any], str]] = [
    ({"threshold": -0.1}, "threshold is -0.1; it must be a number >= 0 (0 never reuses)."),
    ({"threshold": float("nan")}, "threshold is nan; it must be a number >= 0 (0 never reuses)."),
    ({"reuse_interval": 0}, f"reuse_interval is 0; {STEPS}"),
    ({"reuse_interval": 0.1}, f"reuse_interval is 0.1; {STEPS}"),
    ({"reuse_interval": 1.0}, f"reuse_interval is 1.0; {STEPS}"),
    ({"reuse_interval": True}, f"reuse_interval is True; {STEPS}"),
    ({"reuse_fraction": 0.0}, f"reuse_fraction is 0.0; {FRACTION}"),
    ({"reuse_fraction": 1.5}, f"reuse_fraction is 1.5; {FRACTION}"),
    ({"reuse_fraction": True}, f"reuse_fraction is True; {FRACTION}"),
    ({"reuse_interval": 1, "reuse_fraction": 1.0}, "reuse_interval is 1 and reuse_fraction is 1.0; set one of them."),
    ({"tail": 1.01}, "tail is 1.01; it must be in [0, 1]."),
    ({"tail": -0.5}, "tail is -0.5; it must be in [0, 1]."),
    ({"warmup_steps": -1}, "warmup_steps is -1; it must be an int >= 0."),
    ({"num_steps": 0}, "num_steps is 0; it must be an int >= 1."),
    ({"indicator_tokens": 0}, 'indicator_tokens is 0; it must be an int >= 1 or "all".'),
    ({"indicator_blocks": "some"}, "indicator_blocks is 'some'; it must be an int >= 1 or \"all\"."),
    ({"calls_per_step": 0}, "calls_per_step is 0; it must be an int >= 1."),
    ({"policy": "magic"}, "policy is 'magic'; choose one of 'schedule', 'adaptive', 'static', 'guarded'."),
    ({"reuse": "blend"}, "reuse is 'blend'; choose one of 'output', 'residual', 'taylor', 'linear'."),
    ({"policy": "static"}, "policy='static' needs steps_mask: one entry per step, 0 computes and 1 reuses, such as (0, 0, 1, 0)."),
    ({"policy": "static", "steps_mask": (0, 0.5)}, "steps_mask must hold a 0 or a 1 for each step, got (0, 0.5)."),
    ({"policy": "static", "steps_mask": "011"}, "steps_mask must hold a 0 or a 1 for each step, got '011'."),
    ({"policy": "static", "steps_mask": 3}, "steps_mask must hold a 0 or a 1 for each step, got 3."),
    (
        {"policy": "static", "steps_mask": (1, 0)},
        "steps_mask is (1, 0); its entries must be 0 (compute) or 1 (reuse), and the first must be 0: nothing is cached yet.",
    ),
    (
        {"policy": "static", "steps_mask": (0, 1, 1), "num_steps": 4},
        "steps_mask has 3 entries but num_steps is 4; they must be equal.",
    ),
    ({"policy": "guarded"}, "policy='guarded' needs steps_mask: one entry per step, 0 computes and 1 reuses, such as (0, 0, 1, 0)."),
    ({"indicator_bounds": (0.1,)}, "indicator_bounds is set, but policy='schedule' does not read it; remove it, or set policy='guarded'."),
    (
        {"policy": "guarded", "steps_mask": (0, 1), "indicator_bounds": (0.1,)},
        "indicator_bounds has 1 entries, but steps_mask has 2; it must hold a number or None for each step.",
    ),
    ({"policy": "guarded", "steps_mask": (0, 1), "indicator_bounds": (None, -0.1)}, "indicator_bounds holds -0.1; a bound must be >= 0."),
    (
        {"policy": "guarded", "steps_mask": (0, 1), "indicator_bounds": 0.5},
        "indicator_bounds must hold a number or None for each step, got 0.5.",
    ),
    ({"steps_mask": (0, 1)}, "steps_mask is set, but policy='schedule' does not read it; remove it, or set policy='static' or 'guarded'."),
]


@pytest.mark.parametrize(("changes", "message"), GOLDEN, ids=[str(changes) for changes, _ in GOLDEN])
def test_bad_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(bw.ConfigError, match=f"^{re.escape(message)}$"):
        bw.CacheConfig(**changes)


@pytest.mark.parametrize(
    ("fraction", "steps", "resolved"),
    [(None, 50, 5), (1, 50, 50), (0.1, 50, 5), (0.05, 50, 3), (0.05, 30, 2), (0.01, 30, 1), (0.15, 30, 5), (0.29, 50, 15)],
)
def test_fractions_round_half_up(fraction: float | None, steps: int, resolved: int) -> None:
    assert bw.CacheConfig(reuse_fraction=fraction).resolved_interval(steps) == resolved


def test_an_interval_is_a_number_of_steps() -> None:
    assert [bw.CacheConfig(reuse_interval=interval).resolved_interval(2) for interval in (1, 7)] == [1, 7]


def test_an_interval_takes_the_place_of_a_fraction_and_the_other_way_round() -> None:
    config = bw.CacheConfig(reuse_fraction=0.2).changed(reuse_interval=3)
    assert (config.reuse_interval, config.reuse_fraction) == (3, None)
    assert config.changed(reuse_fraction=0.5).resolved_interval(10) == 5


def test_numbers_of_numpy_become_pythons() -> None:
    config = bw.CacheConfig(threshold=np.float32(0.25), reuse_interval=np.int64(3), tail=np.float64(0.5), num_steps=np.int32(9))
    assert config == bw.CacheConfig(threshold=0.25, reuse_interval=3, tail=0.5, num_steps=9)
    assert [type(value) for value in (config.threshold, config.reuse_interval, config.num_steps)] == [float, int, int]


def test_settings_come_as_a_value_a_dictionary_or_one_by_one() -> None:
    assert bw.CacheConfig.of(None) == bw.CacheConfig()
    assert bw.CacheConfig.of({"threshold": 0.2}, num_steps=9) == bw.CacheConfig(threshold=0.2, num_steps=9)
    assert bw.CacheConfig.of(bw.CacheConfig(threshold=0.2), threshold=0.3) == bw.CacheConfig(threshold=0.3)
    with pytest.raises(bw.ConfigError, match=r"^unknown CacheConfig settings: treshold\.\n  There are: threshold, "):
        bw.CacheConfig.of(None, treshold=0.1)
    with pytest.raises(bw.ConfigError, match=r"^config must be a CacheConfig \(.*\) or a dictionary of settings, got float\.$"):
        bw.CacheConfig.of(0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "config",
    [
        bw.CacheConfig(),
        bw.CacheConfig.paper(num_steps=30),
        bw.CacheConfig(reuse_interval=1),
        bw.CacheConfig(reuse_fraction=1.0),
        bw.CacheConfig(policy="static", steps_mask=(0, 1, 0)),
        bw.CacheConfig(policy="guarded", steps_mask=(0, 1, 0), indicator_bounds=(None, 0.5, np.float32(0.25))),
        bw.CacheConfig(threshold=float("inf")),
    ],
)
def test_saved_settings_come_back_with_their_types(config: bw.CacheConfig, tmp_path: Path) -> None:
    config.save(tmp_path / "config.json")
    loaded = bw.CacheConfig.load(tmp_path / "config.json")
    assert loaded == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_tail_that_does_not_fit_64_bits_is_refused() -> None:
    config = bw.CacheConfig(tail=0.061380248414350747)
    config.policy_values(150)
    message = "tail is 0.061380248414350747; its exact fraction times 151 steps does not fit in 64 bits. Use fewer digits."
    with pytest.raises(bw.ConfigError, match=f"^{re.escape(message)}$"):
        config.policy_values(151)


def test_what_the_caller_says_of_a_run_must_fit_the_mask() -> None:
    assert bw.CacheConfig(num_steps=4).steps_of(6) == 6
    config = bw.CacheConfig(policy="static", steps_mask=(0, 1, 0))
    assert (config.steps_of(None), config.steps_of(3)) == (3, 3)
    with pytest.raises(bw.ConfigError, match="steps_mask has 3 entries but num_inference_steps is 4"):
        config.steps_of(4)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(bw.ConfigError, match=r"config\.json is not JSON"):
        bw.CacheConfig.load(path)
    path.write_text('{"treshold": 0.1}')
    with pytest.raises(
        bw.ConfigError, match=r"contains unknown CacheConfig settings: treshold\. Pass a file that CacheConfig\.save wrote\."
    ):
        bw.CacheConfig.load(path)


def test_paper_settings_measure_everything() -> None:
    paper = bw.CacheConfig.paper()
    assert (paper.threshold, paper.resolved_interval(50), paper.tail) == (0.15, 5, 0.5)
    assert (paper.indicator_blocks, paper.indicator_tokens) == ("all", "all")


MASK = bw.CacheConfig(policy="static", steps_mask=(0, 1, 0))
MAY_CHANGE = """
  Can be changed: calibrated_for, calls_per_step, damping, decide, indicator_bounds, num_steps, order, reuse_fraction, reuse_interval,\
 steps_mask, tail, threshold, timesteps, warmup_steps, weights."""


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (
            bw.CacheConfig(),
            {"reuse": "residual", "threshold": 0.1},
            f"the graphs depend on reuse, which cannot be changed now. Transform the model again, or export it again.{MAY_CHANGE}",
        ),
        (bw.CacheConfig(), {"treshold": 0.1}, f"unknown CacheConfig settings: treshold.{MAY_CHANGE}"),
        (bw.CacheConfig(), {"threshold": -1}, "threshold is -1; it must be a number >= 0 (0 never reuses)."),
        (
            MASK,
            {"steps_mask": (0, 1, 1, 0)},
            "steps_mask has 4 entries, but the graphs were built for 3. Transform the model again with the new mask, or export it again.",
        ),
        (
            MASK,
            {"policy": "schedule", "steps_mask": None},
            f"the graphs depend on policy, which cannot be changed now. Transform the model again, or export it again.{MAY_CHANGE}",
        ),
    ],
    ids=["shapes the graphs", "unknown", "bad value", "length of the mask", "another policy"],
)
def test_what_shapes_the_graphs_cannot_change_behind_them(config: bw.CacheConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(bw.ConfigError, match=f"^{re.escape(message)}$"):
        config.changed(**changes)


def test_what_the_graphs_take_as_input_may_change() -> None:
    assert MASK.changed(steps_mask=(0, 0, 1)).steps_mask == (0, 0, 1)
    assert MASK.changed(policy="static") == MASK
    changed = bw.CacheConfig().changed(
        threshold=0.3, reuse_interval=2, tail=0.1, warmup_steps=1, num_steps=9, calls_per_step=2, decide="joint"
    )
    assert changed.graph_settings == bw.CacheConfig().graph_settings


def test_the_guard_must_fit_the_settings() -> None:
    bw.CacheConfig(decide="joint").check_guard("host")
    bw.CacheConfig(granularity="block", reuse="residual").check_guard("graph")
    with pytest.raises(bw.ConfigError, match="decide='joint' requires guard='host'"):
        bw.CacheConfig(decide="joint").check_guard("graph")
    with pytest.raises(bw.ConfigError, match="granularity='block' requires guard='graph'"):
        bw.CacheConfig(granularity="block", reuse="residual").check_guard("host")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    bw.CacheConfig(threshold=0.5).save(path)

    def full(*names: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", full)
        with pytest.raises(OSError, match="no space left"):
            bw.CacheConfig(threshold=0.7).save(path)
    assert bw.CacheConfig.load(path).threshold == 0.5
    assert list(tmp_path.iterdir()) == [path]
    bw.CacheConfig(threshold=0.7).save(path)
    assert bw.CacheConfig.load(path).threshold == 0.7
