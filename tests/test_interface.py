"""What users type: settings without a class, compiled models, names for annotations, contexts that end early, sessions by default."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import bwcache_compile as bw
from tests.models import OneStream

STATIC = {"policy": "static", "steps_mask": (0, 1, 1)}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in two formats."""
    model = OneStream().eval()
    cached = bw.transform(model, threshold=math.inf, num_steps=4, reuse_interval=1, example_args=model.example())
    folder = tmp_path_factory.mktemp("bundles")
    for form in ("onnx", "pt2"):
        bw.export(cached, folder / form, form)
    return {form: folder / form for form in ("onnx", "pt2")}


def test_settings_are_taken_one_by_one_and_as_a_dictionary() -> None:
    model = OneStream().eval()
    assert bw.transform(model, threshold=0.25, num_steps=9).cache_config == bw.CacheConfig(threshold=0.25, num_steps=9)
    assert bw.transform(model, {"threshold": 0.25}, num_steps=9).cache_config == bw.CacheConfig(threshold=0.25, num_steps=9)
    assert bw.transform(model, bw.CacheConfig(threshold=0.25), tail=0.0).cache_config == bw.CacheConfig(threshold=0.25, tail=0.0)
    with pytest.raises(bw.ConfigError, match=r"^unknown CacheConfig settings: treshold\."):
        bw.transform(model, treshold=0.25)


def test_what_torch_compile_returned_is_exported(tmp_path: Path) -> None:
    model = OneStream().eval()
    compiled = torch.compile(bw.transform(model, STATIC), backend="eager")
    with torch.no_grad():
        compiled(*model.example())
    assert bw.export(compiled, tmp_path / "bundle", "pt2").model == "OneStream"
    with pytest.raises(bw.ConfigError, match=r"^export expects the result of transform, got OptimizedModule\.$"):
        bw.export(torch.compile(model), tmp_path / "other")


def test_names_for_annotations() -> None:
    for name in ("BlockSearch", "CachePlan", "CachedModel", "Manifest", "Report", "Session"):
        assert isinstance(getattr(bw, name), type)
        assert name in bw.__all__


def test_repr_says_what_it_is(bundles: dict[str, Path]) -> None:
    model = OneStream().eval()
    cached = bw.transform(model, STATIC)
    settings = "CachedModel(OneStream, policy='static', reuse='output', guard='host', "
    assert repr(cached) == settings + "not captured yet)"
    cached.prepare(model.example())
    assert repr(cached) == settings + "3 blocks cached, 1 program)"
    cached.close()
    assert repr(cached) == settings + "closed)"
    expected = "Session(OneStream, format='onnx', compute and reuse graphs, device='cpu', policy='schedule', reuse='output')"
    assert repr(bw.load(bundles["onnx"])) == expected


def test_one_context_is_dropped_and_the_others_stay() -> None:
    model = OneStream().eval()
    cached = bw.transform(model, STATIC)
    for step in range(2):
        for name in ("one", "other"):
            with torch.no_grad(), cached.cache_context(name, group="video"):
                cached(*model.example(step=step))
    cached.drop_context("one", group="video")
    assert list(cached.report().contexts) == ["video/other"]
    with torch.no_grad():
        with cached.cache_context("one", group="video"):
            assert torch.equal(cached(*model.example(step=2)), model(*model.example(step=2)))
        with cached.cache_context("other", group="video"):
            cached(*model.example(step=2))
    assert [record.computed for record in cached.report().contexts["video/other"].steps] == [True, False, False]
    with pytest.raises(bw.StateError, match=r"^there is no context 'two'\. Contexts: "):
        cached.drop_context("two")


def test_a_sessions_context_is_dropped(bundles: dict[str, Path]) -> None:
    session = bw.load(bundles["onnx"])
    inputs: list[Any] = [value.numpy() for value in OneStream().example()]
    for _ in range(2):
        with session.cache_context("one"):
            session(*inputs)
    session.drop_context("one")
    assert session.report().contexts == {}


def test_the_backend_follows_from_the_bundle(bundles: dict[str, Path]) -> None:
    assert bw.load(bundles["onnx"]).manifest.graph_format == "onnx"
    assert bw.load(bundles["pt2"], allow_code=True).manifest.graph_format == "pt2"
    assert bw.load(bundles["pt2"], device="cpu", allow_code=True).manifest.graph_format == "pt2"
    with pytest.raises(bw.ConfigError, match=r'^backend must be "torch" for graphs of format "pt2", or left out, got \'onnxruntime\'\.$'):
        bw.load(bundles["pt2"], "onnxruntime", allow_code=True)


@pytest.mark.parametrize(
    ("form", "settings", "message"),
    [
        ("onnx", {"device": "abacus"}, r'^device must be "cpu", "cuda" or "cuda:<index>", got \'abacus\'\.'),
        ("onnx", {"device": "cpu", "providers": ["CPUExecutionProvider"]}, "^device and providers both say where the graphs run"),
        ("pt2", {"device": "abacus", "allow_code": True}, "^device 'abacus' is not available: "),
    ],
)
def test_devices_that_are_refused(bundles: dict[str, Path], form: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(bw.ConfigError, match=message):
        bw.load(bundles[form], **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize(("form", "settings"), [("onnx", {}), ("pt2", {"allow_code": True})])
def test_a_device_that_is_not_there_is_named(bundles: dict[str, Path], form: str, settings: dict[str, Any]) -> None:
    with pytest.raises(bw.ConfigError, match=r"CUDAExecutionProvider is not available|device 'cuda:0' is not available"):
        bw.load(bundles[form], device="cuda:0", **settings)


def test_hashes_are_compared_unless_told_otherwise(bundles: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(bundles["pt2"], tmp_path / "bundle")
    weights = tmp_path / "bundle" / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[0] ^= 1
    weights.write_bytes(data)
    with pytest.raises(bw.BundleError, match="SHA-256 mismatch"):
        bw.load(tmp_path / "bundle", allow_code=True)
    assert bw.load(tmp_path / "bundle", allow_code=True, verify_hashes=False).manifest.model == "OneStream"
    weights.write_bytes(data[:-1])
    with pytest.raises(bw.BundleError, match="the file is truncated"):
        bw.load(tmp_path / "bundle", allow_code=True, verify_hashes=False)
