"""What goes wrong while a session runs: each failure has a name and says what to do, and the context goes on as if it had not been."""

from __future__ import annotations

import dataclasses
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline

import bwcache_compile as bw
from tests.models import OneStream

OPEN: dict[str, dict[str, Any]] = {"onnx": {}, "pt2": {"backend": "torch", "allow_code": True}}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One bundle of each kind."""
    model = OneStream(depth=2).eval()
    cached = bw.transform(model, bw.CacheConfig(num_steps=8, threshold=math.inf, reuse_interval=2), example_args=model.example())
    folder = tmp_path_factory.mktemp("bundles")
    for format in OPEN:
        bw.export(cached, folder / format, format=format)
    return folder


def reasons(session: Any, *calls: Any) -> str:
    """Return why each call is refused."""
    found = []
    for call in calls:
        with pytest.raises((bw.BundleError, bw.ConfigError, bw.StateError)) as error:
            call(session)
        found.append(f"{type(error.value).__name__}: {error.value}")
    return "\n".join(found)


def arrays(step: int = 0) -> tuple[Any, ...]:
    return tuple(value.numpy() for value in OneStream().example(step=step))


@pytest.mark.parametrize("format", OPEN)
def test_what_both_refuse(bundles: Path, format: str) -> None:
    session = bw.load(bundles / format, **OPEN[format])
    x, t = arrays()
    with session.cache_context("cond", step_index=8):
        outside = reasons(session, lambda s: s(x, t))
    with session.cache_context("cond", step_index=-1):
        outside += "\n" + reasons(session, lambda s: s(x, t))
    shown = reasons(
        session,
        lambda s: s.cache_context("cond", step_index="3"),
        lambda s: s.cache_context("cond", step_index=[1, 2]),
        lambda s: s.cache_context("cond", num_inference_steps=7.5),
        lambda s: s(x),
        lambda s: s(x, t, t),
        lambda s: s(x, t=t, x=x),
        lambda s: s(x, t, mask=t),
        lambda s: s(x[:, :5], t),
        lambda s: s(x.astype("float64"), t),
        lambda s: s(x, "now"),
        lambda s: s.run_flat({"x": x}),
        lambda s: s.state("uncond"),
        lambda s: s.configure(reuse="residual"),
        lambda s: s.configure(decide="joint"),
    )
    assert_expected_inline(
        f"{outside}\n{shown}".replace("a tensor, a numpy array", "...").replace("a numpy array, an OrtValue", "..."),
        """\
StateError: step_index must be from 0 to 7, got 8: this generation has 8 steps. Pass num_inference_steps to cache_context, or call\
 reset(num_steps=...), if it has more.
StateError: step_index must be from 0 to 7, got -1: this generation has 8 steps. Pass num_inference_steps to cache_context, or call\
 reset(num_steps=...), if it has more.
ConfigError: step_index must be a single whole number, got '3'.
ConfigError: step_index must be a single whole number, got [1, 2], and rows does not name the samples of a batch.
ConfigError: num_inference_steps must be a single whole number, got 7.5.
StateError: missing inputs: t. The bundle takes x, t.
StateError: got 3 positional arguments, but the model takes 2: x, t.
StateError: got x twice, by position and by name.
StateError: unexpected inputs: mask. The bundle takes x, t: the arguments of the call that it was exported for.
StateError: x must have shape [1, 6, 4], got [1, 5, 4]. Every size is fixed in this bundle: transform with dynamic_shapes="auto"\
 and export again to vary them.
StateError: x must have dtype float32, got float64.
StateError: t has unsupported type str; pass ... or an object with DLPack.
StateError: missing inputs: t. The bundle takes x, t.
StateError: context 'uncond' has no cache: it was not called yet, or its generation has ended. Contexts with a cache: none.
ConfigError: the graphs depend on reuse, which cannot be changed now. Transform the model again, or export it again.
  Can be changed: calibrated_for, calls_per_step, damping, decide, indicator_bounds, num_steps, order, reuse_fraction, reuse_interval,\
 steps_mask, tail, threshold, timesteps, warmup_steps, weights.
ConfigError: decide='joint' is not supported by a bundle's session, whose contexts decide separately.""",
    )


def fails(bundle: Path, **arguments: Any) -> str:
    """Let the opened manifest promise sizes that the graphs were not made for: the runtime itself fails."""
    session = bw.load(bundle, **arguments)
    first, second = session.manifest.inputs
    session.manifest = dataclasses.replace(session.manifest, inputs=(dataclasses.replace(first, shape=(1, 6, 5)), second))
    x, t = arrays()
    return reasons(session, lambda s: s(x.repeat(2, axis=2)[..., :5], t)).replace(": ", ":\n  ")


def test_a_failure_inside_onnxruntime(bundles: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(bundles / "onnx", tmp_path / "bundle"))
    assert_expected_inline(
        fails(bundle),
        """\
BundleError:
  ONNX Runtime failed to run compute.onnx:
  Error in execution:
  Got invalid dimensions for input:
  x for the following indices""",
    )


def test_a_failure_inside_torch(bundles: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(bundles / "pt2", tmp_path / "bundle"))
    assert_expected_inline(
        fails(bundle, **OPEN["pt2"]),
        """\
BundleError:
  torch failed to run compute.pt2:
  RuntimeError:
  mat1 and mat2 shapes cannot be multiplied (6x5 and 4x8)""",
    )


@pytest.mark.parametrize("format", OPEN)
@pytest.mark.parametrize("size", [10**15, 10**30, "-1"])
def test_a_cache_that_cannot_be_made(bundles: Path, format: str, size: int | str) -> None:
    session = bw.load(bundles / format, **OPEN[format])
    first, *others = session.manifest.slots
    session.manifest = dataclasses.replace(session.manifest, slots=(dataclasses.replace(first, shape=(size,)), *others))
    found = reasons(session, lambda s: s(*arrays()))
    assert found.startswith(f"BundleError: cannot allocate the cache slot output_0 (float32, shape ({size},)): ")


@pytest.mark.parametrize("format", OPEN)
def test_a_failed_step_is_taken_again(bundles: Path, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first step, at a reused one and at a computed one: afterwards the run is what it would have been."""
    session, expected = (bw.load(bundles / format, **OPEN[format]) for _ in range(2))
    for step in range(8):
        if step in (0, 3, 4):
            with monkeypatch.context() as patch:
                patch.setattr(session._runner, "run", _broken)
                assert reasons(session, lambda s, step=step: s(*arrays(step))) == "BundleError: the device is gone"
        actual, wanted = session(*arrays(step)), expected(*arrays(step))
        assert torch.equal(torch.as_tensor(actual), torch.as_tensor(wanted))
    assert str(session.report()) == str(expected.report()) == "default: 4 computed, 4 reused  ##..#..#"


def _broken(*_: Any) -> dict[str, Any]:
    raise bw.BundleError("the device is gone")


def test_a_runtime_that_is_not_there(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = []
    for module, format in (("onnxruntime", "onnx"), ("torch", "pt2")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(bw.ConfigError) as error:
                bw.load(bundles / format, **OPEN[format])
        messages.append(str(error.value))
    assert_expected_inline(
        "\n".join(messages),
        """\
backend="onnxruntime" needs onnxruntime: pip install "bwcache-compile[ort]".
backend="torch" needs torch: pip install "bwcache-compile[torch]".""",
    )
