"""Bundles that are damaged, altered or made to do harm, and exports that fail: each is refused by name, nothing is left."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import onnx
import pytest

import bwcache_compile as bw
from bwcache_compile.bundle.files import file_hash, open_bundle
from bwcache_compile.exporters.onnx import export as exporting
from tests.exporters.helpers import Edit, edit, refusal
from tests.models import OneStream


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = OneStream(width=32).eval()
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    bw.export(bw.transform(model, bw.CacheConfig(num_steps=8), example_args=model.example()), folder)
    return folder


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "bundle"))


def test_files(bundle: Path) -> None:
    weights = bundle / "weights.bin"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1])
    again = "Copy it again, or export it again."
    size = f"has {len(data) - 1} bytes, expected {len(data)}: the file is truncated. {again}"
    assert refusal(bundle) == f".../bundle/weights.bin {size}"
    weights.write_bytes(b"\1" + data[1:])
    assert refusal(bundle) == f"SHA-256 mismatch for .../bundle/weights.bin: the file was changed after export. {again}"
    weights.unlink()
    assert refusal(bundle) == ".../bundle/weights.bin is missing; the bundle is incomplete. Copy it again, or export it again."
    outside = bundle.parent / "weights"
    outside.write_bytes(data)
    weights.symlink_to(outside)
    assert refusal(bundle) == ".../bundle/weights.bin is missing; the bundle is incomplete. Copy it again, or export it again."


@pytest.mark.parametrize(("change", "message"), [
    (lambda m: m.update(format_version=3), "format version 3, but this version of bwcache-compile reads up to 2. Upgrade bwcache-compile."),
    (lambda m: m.update(format_version=1), "has format version 1, but this version of bwcache-compile reads 2. Export the model again."),
    (lambda m: m.update(format_version="1"), "format_version must be an integer, got '1'."),
    (lambda m: m.update(format="zip"), "is not the manifest of a bundle."),
    (lambda m: m.pop("slots"), "manifest.json: manifest: slots is missing."),
    (lambda m: m["inputs"][0].update(argument=3), "manifest.json: manifest.inputs[0].argument: expected text, got 3."),
    (lambda m: m.update(conditions=None), "manifest.json: manifest.conditions: expected a list, got None."),
    (lambda m: m["slots"][0].pop("fill"), "manifest.json: manifest.slots[0]: fill is missing."),
    (lambda m: m["slots"].append(m["slots"][0]), "manifest.json: duplicate name output_0 in slots."),
    (lambda m: m["outputs"].update(form={"tensor": "z"}), "manifest.json: invalid output structure {'tensor': 'z'}."),
    (lambda m: m["outputs"].update(form={"tuple": [{"value": []}]}), "manifest.json: invalid output structure {'value': []}."),
    (lambda m: m["outputs"].update(items=[], form={"value": 1}), "manifest.json: there are no outputs."),
    (lambda m: m["slots"][0].update(shape=[1, 6, 7]), "shape [1, 6, 32] for cache_in.output_0, but the manifest lists [1, 6, 7]."),
    (lambda m: m["graphs"]["compute"]["outputs"].remove("reuse_left"), "the compute graph lacks the outputs reuse_left."),
    (lambda m: m["config"].update(num_steps=10**30), "it must be at most 2147483647"),
    (lambda m: m["inputs"][0].update(dtype="complex32"), "x has unsupported dtype 'complex32'; supported are"),
    (lambda m: m["slots"][0].update(shape=[-1]), "output_0 has an invalid shape [-1]."),
    (lambda m: m["files"].update({"../other": {"bytes": 1, "sha256": ""}}), "refers to '../other', which is outside the bundle."),
    (lambda m: m["graphs"]["reuse"].update(file="/reuse.onnx"), "the file of the reuse graph is not among the bundle's files."),
    (lambda m: m["graphs"].pop("reuse"), "does not list a compute and a reuse graph."),
    (lambda m: m["config"].update(threshold=-1), "config: not valid in this version: threshold is -1"),
    (lambda m: m["inputs"][0].update(dtype="float16"), "has dtype float32 for x, but the manifest lists float16."),
    (lambda m: m["graphs"]["reuse"]["inputs"].reverse(), "but the manifest lists ['step', "),
])  # fmt: skip
def test_manifests(bundle: Path, change: Edit, message: str) -> None:
    edit(bundle, change)
    assert message in refusal(bundle)


def test_every_byte_of_a_manifest_counts(bundle: Path) -> None:
    """One flipped bit, or one other byte, anywhere: the checksum, names that nothing reads, white space."""
    path = bundle / "manifest.json"
    data = path.read_bytes()
    for i in range(0, len(data), 7):
        for other in (data[i] ^ (1 << i % 8), ord(" ") if data[i] == ord("\n") else ord("\n")):
            path.write_bytes(data[:i] + bytes([other]) + data[i + 1 :])
            with pytest.raises(bw.BundleError, match=r"cannot read .*manifest\.json"):
                open_bundle(bundle)
    path.write_text(data.decode().replace('"schedule"', '"schedula"'))
    assert refusal(bundle) == ("cannot read .../bundle/manifest.json: checksum mismatch: the manifest was changed after export.")


def test_manifests_that_are_none(bundle: Path) -> None:
    (bundle / "manifest.json").write_text("{")
    assert refusal(bundle).startswith("cannot read .../bundle/manifest.json: not valid JSON: Expecting property name")
    (bundle / "manifest.json").unlink()
    assert refusal(bundle) == ".../bundle/manifest.json does not exist: .../bundle is not a bundle."


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "manifest.json"])
def test_weights_from_elsewhere(bundle: Path, location: str) -> None:
    path = bundle / "compute.onnx"
    model = onnx.load(path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(entry for entry in tensor.external_data if entry.key == "location").value = location
    path.write_bytes(model.SerializeToString())
    edit(bundle, lambda manifest: None, "compute.onnx")
    assert refusal(bundle) == f".../bundle/compute.onnx reads weights from {location!r}, which is not among the bundle's files."


def test_a_graph_that_is_none(bundle: Path) -> None:
    path = bundle / "compute.onnx"
    path.write_bytes(path.read_bytes()[:1000])
    edit(bundle, lambda manifest: None, "compute.onnx")
    assert refusal(bundle) == ".../bundle/compute.onnx is not an ONNX model: truncated field."


def test_sizes_are_arithmetic_and_nothing_else(bundle: Path) -> None:
    edit(bundle, lambda m: m["conditions"].append("__import__('os').getpid()"))
    session = bw.load(bundle)
    with pytest.raises(bw.BundleError, match="cannot be evaluated: Call is not supported in a size expression"):
        session(*(value.numpy() for value in OneStream().example()))


def test_values_belong_to_an_input_that_can_be_read(bundle: Path) -> None:
    edit(bundle, lambda m: m["values"].append({"input": "mask", "value": [1, 0]}))
    assert refusal(bundle) == ".../bundle/manifest.json: values lists mask, which is not an input or has dtype bfloat16."


def test_a_failed_export_leaves_what_was_there(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: file_hash(path) for path in bundle.iterdir()}
    model = OneStream(width=32).eval()
    cached = bw.transform(model, bw.CacheConfig(num_steps=8), example_args=model.example())

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "check_runs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bw.export(cached, bundle)
    assert {path.name: file_hash(path) for path in bundle.iterdir()} == before
    with pytest.raises(KeyboardInterrupt):
        bw.export(cached, bundle.parent / "new")
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_a_graph_guard_is_exported_too(tmp_path: Path) -> None:
    model = OneStream().eval()
    config = bw.CacheConfig(num_steps=8, threshold=math.inf)
    cached = bw.transform(model, config, guard="graph", example_args=model.example())
    assert bw.export(cached, tmp_path / "bundle", guarded=True).self_check["steps"] == "##..#."
