"""A policy, an indicator and a way of reusing from outside of the package, by one call each."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

import bwcache_compile as bw
from bwcache_compile.policies import (
    INDICATORS,
    POLICIES,
    REUSES,
    Parameter,
    Policy,
    Reuse,
    SmallSlot,
    register_indicator,
    register_policy,
    register_reuse,
)
from tests.models import OneStream


def decide(step: Tensor, change: Tensor, computed: Tensor, interval: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Count computed steps; from the second on, reuse `interval` steps where no block moved by more than the threshold."""
    computed = computed + 1
    calm = (change < threshold).all().reshape(1)
    return computed, torch.where(calm & (computed > 1), interval, torch.zeros_like(interval))


def values(config: bw.CacheConfig, num_steps: int | None) -> dict[str, tuple[float | int, ...]]:
    return {"interval": (config.resolved_interval(num_steps or 1),), "threshold": (float(config.threshold),)}


def largest_change(features: list[Tensor], references: list[Tensor]) -> Tensor:
    return torch.stack([(f.float() - r.float()).abs().max() / r.float().abs().max() for f, r in zip(features, references, strict=True)])


def keep_mean(output: Tensor, kept_output: Tensor, kept_seen: Tensor) -> Tensor:
    """Keep the mean of the last two outputs."""
    return torch.where(kept_seen >= 0, (output + kept_output) / 2, output)


def faded(kept_output: Tensor, step: Tensor, kept_seen: Tensor) -> Tensor:
    return kept_output * (1 - 0.01 * (step - kept_seen).to(kept_output.dtype))


def see(step: Tensor, kept_seen: Tensor) -> Tensor:
    return step


TOY_POLICY = Policy(
    decide=decide,
    values=values,
    parameters=(Parameter("interval"), Parameter("threshold", "float32")),
    slots=(SmallSlot("computed", "int64", (1,), fill=0),),
)
TOY_REUSE = Reuse(keep=keep_mean, reuse=faded, shared=(SmallSlot("seen", "int64", (1,), fill=-1),), keep_shared=see)
CONFIG: dict[str, Any] = {"policy": "toy", "reuse": "toy", "indicator": "toy", "indicator_tokens": "all", "reuse_interval": 2}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    before = [(known, dict(known)) for known in (POLICIES, INDICATORS, REUSES)]
    register_policy("toy", TOY_POLICY)
    register_indicator("toy", largest_change)
    register_reuse("toy", TOY_REUSE)
    yield
    for known, names in before:  # the other tests list what there is
        known.clear()
        known.update(names)  # type: ignore[arg-type]


def by_hand(model: OneStream, steps: int, threshold: float) -> tuple[list[Tensor], str]:
    """Run the model as the toys say."""
    outputs, pattern, left, seen, kept, before = [], "", 0, -1, torch.zeros(()), []
    for step in range(steps):
        x, t = model.example(step=step)
        x, temb = model.patch(x), model.embed(t)
        if left:
            left, pattern = left - 1, pattern + "."
            outputs.append(model.head(kept * (1 - 0.01 * torch.tensor([step - seen], dtype=torch.float32))))
            continue
        features = []
        for block in model.blocks:
            x = block(x, temb)
            features.append(x)
        if before:
            left = 2 if bool((largest_change(features, before) < threshold).all()) else 0
            kept = (x + kept) / 2
        else:
            kept = x
        seen, before, pattern = step, features, pattern + "#"
        outputs.append(model.head(x))
    return outputs, pattern


@pytest.fixture(scope="module")
def model() -> OneStream:
    torch.manual_seed(0)
    return OneStream(depth=3).eval().requires_grad_(False)


def ran(cached: Any, model: OneStream, steps: int) -> tuple[list[Any], str]:
    outputs = [cached(*model.example(step=step)) for step in range(steps)]
    return outputs, "".join("#" if step.computed else "." for step in cached.report().contexts["default"].steps)


@pytest.mark.parametrize("guard", ["host", "graph"])
def test_the_toys_decide_keep_and_reuse(model: OneStream, guard: Any) -> None:
    for threshold in (0.0, 0.2, float("inf")):
        cached = bw.transform(model, bw.CacheConfig(**CONFIG, threshold=threshold), guard=guard)
        wanted, pattern = by_hand(model, 8, threshold)
        outputs, found = ran(cached, model, 8)
        assert found == pattern
        for output, want in zip(outputs, wanted, strict=True):
            torch.testing.assert_close(output, want)
    assert pattern == "##..#..#"
    assert "policy toy, reuse toy" in str(cached.plan)
    cached.configure(reuse_interval=1)
    cached.reset()
    assert ran(cached, model, 6)[1] == "##.#.#", "the parameters are inputs of the graphs"


@pytest.mark.parametrize("guarded", [False, True])
def test_a_bundle_holds_them(model: OneStream, tmp_path: Path, guarded: bool) -> None:
    pytest.importorskip("onnxruntime")
    cached = bw.transform(model, bw.CacheConfig(**CONFIG, threshold=float("inf")), example_args=model.example())
    manifest = bw.export(cached, tmp_path / "bundle", guarded=guarded)
    assert [name for name in manifest.graphs["compute"].inputs if name.startswith("policy.")] == [
        "policy.interval",
        "policy.threshold",
    ]
    session = bw.load(tmp_path / "bundle", guarded=guarded)
    wanted, pattern = by_hand(model, 8, float("inf"))
    outputs = [session(*(value.numpy() for value in model.example(step=step))) for step in range(8)]
    assert "".join("#" if step.computed else "." for step in session.report().contexts["default"].steps) == pattern
    for output, want in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(torch.from_numpy(output), want, rtol=1e-4, atol=1e-5)


def test_the_page_that_explains_it_runs(model: OneStream) -> None:
    page = (Path(__file__).parents[1] / "docs" / "adding_a_policy.md").read_text()
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code.replace('"toy"', '"page"'), names)
    config = bw.CacheConfig(policy="page", reuse="page", indicator="page", threshold=float("inf"), reuse_interval=2)
    assert ran(bw.transform(model, config), model, 8)[1] == "##..#..#"


def test_a_bundle_needs_what_it_was_made_with(model: OneStream, tmp_path: Path) -> None:
    cached = bw.transform(model, bw.CacheConfig(**CONFIG), example_args=model.example())
    bw.export(cached, tmp_path / "bundle")
    del POLICIES["toy"]
    with pytest.raises(bw.BundleError, match=r"policy is 'toy'; choose one of 'schedule', 'adaptive', 'static', 'guarded'"):
        bw.load(tmp_path / "bundle")
    register_policy("toy", TOY_POLICY)
    bw.load(tmp_path / "bundle")


def complaint(function: Any) -> str:
    with pytest.raises(bw.ConfigError) as caught:
        function()
    return str(caught.value)


def test_what_does_not_fit_is_named(model: OneStream) -> None:
    register_policy("toy", TOY_POLICY)  # the same once more
    half = dataclasses.replace(TOY_REUSE, keep=lambda output: output.half())
    register_reuse("toy_half", half)
    register_policy("toy_wide", dataclasses.replace(TOY_POLICY, decide=lambda step, computed: (computed, step.repeat(2))))
    assert_expected_inline(
        "\n".join(
            complaint(function)
            for function in (
                lambda: register_policy("schedule", TOY_POLICY),
                lambda: register_policy("two words", TOY_POLICY),
                lambda: register_policy("other", dataclasses.replace(TOY_POLICY, slots=())),
                lambda: register_policy("other", dataclasses.replace(TOY_POLICY, parameters=(Parameter("step"),))),
                lambda: register_reuse("other", dataclasses.replace(TOY_REUSE, keep_shared=None)),
                lambda: register_reuse("other", dataclasses.replace(TOY_REUSE, reuse=lambda output: output)),
                lambda: register_indicator("other", lambda features: features),
                lambda: bw.CacheConfig(indicator="other"),
                lambda: register_reuse("other", dataclasses.replace(TOY_REUSE, parameters=(Parameter("share", "float32"),))),
                lambda: bw.CacheConfig(policy="toy", steps_mask=(0, 1)),
                lambda: bw.transform(model, bw.CacheConfig(reuse="toy_half"), example_args=model.example()),
                lambda: bw.transform(model, bw.CacheConfig(policy="toy_wide"), example_args=model.example()),
            )
        ),
        """\
policy 'schedule' is already registered. Choose another name.
policy: invalid name 'two words'; it must be a Python identifier.
policy 'other': `decide` has an unknown argument 'computed'; allowed are step, change, interval, threshold.
policy 'other': invalid slot or parameter name 'step'. Names must be unique Python identifiers and must not be reserved.
reuse 'other': shared slots and `keep_shared` must be given together.
reuse 'other': `reuse` has an unknown argument 'output'; allowed are source, kept_output, kept_seen, time, step.
indicator 'other' must be a function of two lists of tensors, the features and their references.
indicator is 'other'; choose one of 'l1', 'toy'.
reuse 'other': `parameters` and `values` must be given together.
steps_mask is set, but policy='toy' does not read it; remove it, or set policy='static' or 'guarded'.
reuse='toy_half': `<lambda>` must return f32[1, 6, 8], got f16[1, 6, 8].
policy='toy_wide': `decide` must return i64[1], i64[1], got i64[1], i64[2].""",
    )
