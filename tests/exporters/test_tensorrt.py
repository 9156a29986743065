"""Engines: what is asked of TensorRT's real API, the session over a double of it, profiles, and the operator list."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

import bwcache_compile as bw
from bwcache_compile.bundle.dynamic_shapes import profile
from bwcache_compile.bundle.files import open_bundle
from bwcache_compile.bundle.manifest import TensorRTEntry
from bwcache_compile.bundle.runners.engine import TensorRTRunner
from bwcache_compile.bundle.session import Session
from bwcache_compile.exporters.tensorrt import engines as tensorrt
from bwcache_compile.exporters.tensorrt.operators import unlisted_operators
from tests.exporters.helpers import Exported
from tests.exporters.tensorrt_double import Double
from tests.models import OneStream, noise


def everything(folder: Path, engines: Path) -> Session:
    """Use all that the exporter uses: every option of `build`, both forms, two profiles."""
    seen: list[Any] = []
    profiles = [{"x[1]": (2, 6, 8)}, {"x[1]": (8, 16, 64)}]
    tensorrt.build(
        folder, engines, profiles=profiles, version_compatible=True, stripped=True, workspace=2**30, progress=lambda *now: seen.append(now)
    )
    session = tensorrt.load(folder, engines, allow_code=True, device="cpu")
    for tokens in (6, 16):
        session(noise("x", 0, 2, tokens, 4), torch.ones(2))
    return session


USED = """\
Builder.build_serialized_network Builder.create_builder_config Builder.create_network Builder.create_optimization_profile
BuilderFlag.REFIT_IDENTICAL BuilderFlag.STRICT_NANS BuilderFlag.STRIP_PLAN BuilderFlag.TF32 BuilderFlag.VERSION_COMPATIBLE
IBuilderConfig.add_optimization_profile IBuilderConfig.clear_flag IBuilderConfig.create_timing_cache
IBuilderConfig.get_timing_cache IBuilderConfig.set_flag IBuilderConfig.set_memory_pool_limit IBuilderConfig.set_timing_cache
ICudaEngine.create_execution_context ICudaEngine.get_tensor_dtype ICudaEngine.get_tensor_mode ICudaEngine.get_tensor_name
IExecutionContext.execute_async_v3 IExecutionContext.get_tensor_shape IExecutionContext.set_input_shape
IExecutionContext.set_optimization_profile_async IExecutionContext.set_tensor_address
IOptimizationProfile.set_shape
ITimingCache.serialize
MemoryPoolType.WORKSPACE
NetworkDefinitionCreationFlag.STRONGLY_TYPED
OnnxParser.parse_from_file
OnnxParserRefitter.refit_from_file
Refitter.refit_cuda_engine
Runtime.deserialize_cuda_engine
TensorIOMode.INPUT"""
PROPERTIES = """\
IBuilderConfig.progress_monitor ICudaEngine.num_io_tensors IExecutionContext.active_optimization_profile
Runtime.engine_host_code_allowed"""


def test_the_real_api_has_what_is_used(trt: Double, deployed: Exported, tmp_path: Path) -> None:
    everything(deployed.folder, tmp_path)
    used = trt.used | {f"{name}.{method}" for name, method, _ in trt.calls()}
    assert used == set(USED.split())
    trt.check()


@pytest.mark.parametrize("removed", [*USED.split(), *PROPERTIES.split()])
def test_a_removed_attribute_fails(
    removed: str, real: types.ModuleType, deployed: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutation that the contract is there for: an API without one of the names that the exporter uses."""
    monkeypatch.setitem(sys.modules, "tensorrt", Double(real, deployed.manifest, removed))
    with pytest.raises(AttributeError, match=removed.partition(".")[2]):
        everything(deployed.folder, tmp_path)


def test_a_call_with_other_arguments_fails(trt: Double) -> None:
    trt.of("Builder").create_network(1, 2)
    with pytest.raises(AssertionError, match=r"Builder.create_network\(1, 2\)"):
        trt.check()


@pytest.mark.parametrize("guarded", [False, True])
def test_the_session_is_torch(trt: Double, deployed: Exported, tmp_path: Path, guarded: bool) -> None:
    """Engines that run in ONNX Runtime: the session's buffers, addresses, profiles and decisions."""
    tensorrt.build(deployed.folder, tmp_path)
    session = tensorrt.load(deployed.folder, tmp_path, guarded=guarded, device="cpu")
    deployed.cached.reset()
    for step in range(8):
        for name in ("cond", "uncond"):
            x, t = noise(f"x{name}", step, 2, 6, 4), torch.full((2,), 1 - step / 8)
            with torch.no_grad(), deployed.cached.cache_context(name), session.cache_context(name):
                expected, actual = deployed.cached(x, t), session(x, t=t.numpy())
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert str(session.report()) == str(deployed.cached.report())


def test_each_stream_has_an_execution_context(trt: Double, deployed: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two streams that share one would overwrite each other's activations and addresses."""
    tensorrt.build(deployed.folder, tmp_path)
    session = tensorrt.load(deployed.folder, tmp_path, device="cpu")
    used: dict[int, set[int]] = {1: set(), 2: set()}
    for _ in range(2):
        for stream in used:
            monkeypatch.setattr(TensorRTRunner, "_stream", lambda self, stream=stream: stream)
            with session.cache_context(str(stream)):
                session(noise("x", 0, 2, 6, 4), torch.ones(2))
    contexts = {id(made): made for name, made in trt.mocks if name == "IExecutionContext"}
    for key, made in contexts.items():
        for call in made.execute_async_v3.call_args_list:
            used[call.args[0]].add(key)
    assert used[1]
    assert used[2]
    assert not used[1] & used[2]


def test_a_stream_that_is_captured_borrows_a_context(
    trt: Double, deployed: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None can be made while a CUDA graph is captured; the stream gets its own at the first run outside of a capture."""
    tensorrt.build(deployed.folder, tmp_path)
    session = tensorrt.load(deployed.folder, tmp_path, device="cpu")
    runner: Any = session._runner
    runner._device = torch.device("cuda")
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    first, second = (runner._context("compute", stream) for stream in (1, 2))
    assert first is not second
    capturing = True
    assert runner._context("compute", 2) is second
    assert runner._context("compute", 3) is first
    capturing = False
    assert all(runner._context("compute", 3) is not other for other in (first, second))
    assert runner._context("reuse", 1) is not first


def test_engines_that_do_not_fit_are_refused(trt: Double, deployed: Exported, tmp_path: Path) -> None:
    tensorrt.build(deployed.folder, tmp_path, kinds=("compute", "reuse"), profiles=[{"x[1]": (2, 6, 8)}], version_compatible=True)
    session = tensorrt.load(deployed.folder, tmp_path, allow_code=True, device="cpu")
    messages = []
    with pytest.raises(bw.StateError) as large:
        session(noise("x", 0, 2, 9, 4), torch.ones(2))
    messages.append(large.value)
    with pytest.raises(bw.BundleError) as code:
        tensorrt.load(deployed.folder, tmp_path, device="cpu")
    messages.append(code.value)
    with pytest.raises(bw.BundleError) as missing:
        tensorrt.load(deployed.folder, tmp_path, guarded=True, device="cpu")
    messages.append(missing.value)
    (tmp_path / "reuse.engine").write_bytes(b"other")
    with pytest.raises(bw.BundleError) as altered:
        tensorrt.load(deployed.folder, tmp_path, device="cpu")
    messages.append(altered.value)
    shown = "\n".join(map(str, messages)).replace(str(tmp_path), "ENGINES")
    assert_expected_inline(
        shown,
        """\
compute.engine was built for x [2, 2, 4] to [4, 8, 4], t [2] to [4], got x [2, 9, 4], t [2]. Build it with another optimization profile.
ENGINES contains version-compatible engines, which carry code. Pass allow_code=True if you trust their author.
cannot read the engines guarded in ENGINES: KeyError('guarded').
SHA-256 mismatch for ENGINES/reuse.engine: the engine was changed after it was built.""",
    )


def test_profiles(deployed: Exported) -> None:
    shapes = {
        "by default": profile(deployed.manifest, "reuse"),
        "asked for": profile(deployed.manifest, "compute", {"x[0]": (2, 2, 2), "x[1]": (16, 64, 320)}),
    }
    lines = [line for title, group in shapes.items() for line in (title, *(f"  {name}: {ends}" for name, ends in group.items()))]
    for sizes in ({"y[0]": (1, 2, 3)}, {"x[1]": (8, 4, 16)}, {"x[0]": (1, 2, 4)}):
        with pytest.raises(bw.ConfigError) as refusal:
            profile(deployed.manifest, "compute", sizes)  # type: ignore[arg-type]
        lines.append(str(refusal.value))
    assert_expected_inline(
        "\n".join(lines),
        """\
by default
  x: ((2, 3, 4), (2, 6, 4), (4, 12, 4))
  t: ((2,), (2,), (4,))
  cache_in.output_0: ((2, 3, 32), (2, 6, 32), (4, 12, 32))
asked for
  x: ((2, 16, 4), (2, 64, 4), (2, 320, 4))
  t: ((2,), (2,), (2,))
  cache_in.reference_0: ((1, 32), (4, 32), (20, 32))
  cache_in.reference_1: ((1, 32), (4, 32), (20, 32))
  cache_in.reference_2: ((1, 32), (4, 32), (20, 32))
unknown dynamic sizes: y[0]. This bundle has x[0], x[1].
x[1] must be (smallest, usual, largest), got (8, 4, 16).
smallest sizes: shape constraint violated: the graphs require x.shape[0] >= 2, got x.shape[0] = 1.""",
    )


def test_what_is_put_into_the_bundle(trt: Double, tmp_path: Path) -> None:
    model = OneStream().eval()
    cached = bw.transform(model, bw.CacheConfig(num_steps=8), example_args=model.example(2), dynamic_shapes="auto")
    bundle = tmp_path / "bundle"
    bw.export(cached, bundle)
    assert tensorrt.prepare(bundle, {"x[1]": (2, 6, 12)}) == []
    manifest = open_bundle(bundle).manifest  # the added files are verified too
    assert {"build_engines.py", "trtexec.sh"} <= set(manifest.files)
    assert manifest.tensorrt == TensorRTEntry(list="10.15", unlisted=(), sizes={"x[1]": (2, 6, 12)})
    assert_expected_inline(
        (bundle / "trtexec.sh").read_text(),
        """\
#!/bin/sh
# sh trtexec.sh ENGINES: one engine per graph.
set -e
: ${1:?the folder for the engines}
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")"
trtexec --onnx=compute.onnx --saveEngine="$out/compute.engine" --timingCacheFile="$out/timing.cache" \\
  --noTF32 --skipInference \\
  --minShapes=x:2x2x4,t:2,cache_in.reference_0:1x8,cache_in.reference_1:1x8,cache_in.reference_2:1x8 \\
  --optShapes=x:2x6x4,t:2,cache_in.reference_0:1x8,cache_in.reference_1:1x8,cache_in.reference_2:1x8 \\
  --maxShapes=x:4x12x4,t:4,cache_in.reference_0:1x8,cache_in.reference_1:1x8,cache_in.reference_2:1x8
trtexec --onnx=reuse.onnx --saveEngine="$out/reuse.engine" --timingCacheFile="$out/timing.cache" \\
  --noTF32 --skipInference \\
  --minShapes=x:2x2x4,t:2,cache_in.output_0:2x2x8 \\
  --optShapes=x:2x6x4,t:2,cache_in.output_0:2x6x8 \\
  --maxShapes=x:4x12x4,t:4,cache_in.output_0:4x12x8
""",
    )
    trt.manifest = manifest
    scope = {"__name__": "__main__", "__file__": str(bundle / "build_engines.py")}
    sys_argv, sys.argv = sys.argv, ["build_engines.py", str(tmp_path / "engines")]
    try:
        exec((bundle / "build_engines.py").read_text(), scope)
    finally:
        sys.argv = sys_argv
    assert sorted(path.name for path in (tmp_path / "engines").iterdir()) == [
        "compute.engine",
        "engines.json",
        "reuse.engine",
        "timing.cache",
    ]
    tensorrt.load(bundle, tmp_path / "engines", device="cpu")(*model.example(2))
    assert bw.load(bundle).manifest.tensorrt == manifest.tensorrt


def test_a_bundle_of_torch_is_refused(tmp_path: Path) -> None:
    model = OneStream().eval()
    bw.export(bw.transform(model, bw.CacheConfig(num_steps=8), example_args=model.example()), tmp_path / "bundle", format="pt2")
    with pytest.raises(bw.BundleError, match='has format "pt2"; engines are built from a bundle of format "onnx"'):
        tensorrt.prepare(tmp_path / "bundle")


class Odd(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + (x.to(torch.int64) ^ 3).to(x.dtype)


class WithOdd(OneStream):
    """Its blocks hold an operator that TensorRT does not list."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.up = torch.nn.Sequential(Odd(), block.up)


def test_operators_that_are_not_listed(deployed: Exported, tmp_path: Path) -> None:
    assert unlisted_operators(open_bundle(deployed.folder)) == []
    model = WithOdd().eval()
    bw.export(bw.transform(model, bw.CacheConfig(num_steps=8), example_args=model.example()), tmp_path / "bundle")
    assert_expected_inline(
        "\n".join(tensorrt.prepare(tmp_path / "bundle")),
        """\
compute: BitwiseXor blocks.0.up.0/node_bitwise_xor of blocks.0.up.0: the operator is not listed
compute: BitwiseXor blocks.1.up.0/node_bitwise_xor_1 of blocks.1.up.0: the operator is not listed
compute: BitwiseXor blocks.2.up.0/node_bitwise_xor_2 of blocks.2.up.0: the operator is not listed""",
    )


@pytest.mark.tensorrt
def test_real_engines(deployed: Exported, tmp_path: Path) -> None:
    """With TensorRT and a GPU: build both forms, and run them beside torch."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if getattr(pytest.importorskip("tensorrt", reason="needs NVIDIA TensorRT"), "Builder", None) is None:
        pytest.skip("needs NVIDIA TensorRT's builder library")
    tensorrt.build(deployed.folder, tmp_path)
    for guarded in (False, True):
        session = tensorrt.load(deployed.folder, tmp_path, guarded=guarded)
        deployed.cached.reset()
        for step in range(8):
            x, t = noise("x", step, 2, 6, 4), torch.full((2,), 1 - step / 8)
            with torch.no_grad():
                torch.testing.assert_close(session(x.cuda(), t.cuda()).cpu(), deployed.cached(x, t), rtol=1e-3, atol=1e-4)
        assert str(session.report()).split()[:6] == str(deployed.cached.report()).split()[:6]
