"""Bundles of torch's own files: they can run code, so they are opened only where that is asked for; damage is named."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest
from expecttest import assert_expected_inline

import bwcache_compile as bw
from bwcache_compile.bundle.files import file_hash
from bwcache_compile.exporters.torch import export as exporting
from tests.exporters.helpers import Edit, edit, refusal
from tests.models import OneStream

TORCH: dict[str, Any] = {"backend": "torch", "allow_code": True}


@pytest.fixture(scope="module")
def cached() -> bw.CachedModel:
    model = OneStream(depth=2).eval()
    return bw.transform(model, bw.CacheConfig(num_steps=8), example_args=model.example())


@pytest.fixture(scope="module")
def original(cached: bw.CachedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    bw.export(cached, folder, format="pt2")
    return folder


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "bundle"))


def test_code_is_asked_for(bundle: Path) -> None:
    messages = [refusal(bundle, backend="torch")]
    edit(bundle, lambda manifest: manifest.update(graph_format="aoti"))
    messages.append(refusal(bundle, backend="torch"))
    for arguments in ({"backend": "onnxruntime"}, {"allow_code": True, "outputs": "numpy"}):
        with pytest.raises(bw.ConfigError) as error:
            bw.load(bundle, **arguments)
        messages.append(str(error.value).replace(str(bundle.parent), "..."))
    shown = "\n".join(line for text in messages for line in textwrap.wrap(text, 120))
    assert_expected_inline(
        shown,
        """\
.../bundle has format "pt2": torch.export.load unpickles parts of the files, which can run any code. Pass
allow_code=True if you trust its author; bundles of format "onnx" contain no code.
.../bundle has format "aoti": a package holds machine code, which runs when it is opened. Pass allow_code=True if you
trust its author; bundles of format "onnx" contain no code.
backend must be "torch" for graphs of format "aoti", or left out, got 'onnxruntime'.
guarded, providers, options and outputs require a bundle of format "onnx".""",
    )


class _Planted:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def plant(archive: Path, payload: bytes) -> None:
    """Put a pickle where a program keeps its example inputs."""
    content = io.BytesIO()
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(content, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, payload if "sample_inputs" in entry.filename else old.read(entry))
    archive.write_bytes(content.getvalue())


def test_a_planted_pickle_runs_where_code_is_allowed_and_only_there(bundle: Path) -> None:
    """What torch does today. If the last line fails, torch has become safer and the documentation may say so."""
    mark = bundle.parent / "mark"
    plant(bundle / "compute.pt2", pickle.dumps(_Planted(mark)))
    assert refusal(bundle, **TORCH).startswith(".../bundle/compute.pt2 has ")
    edit(bundle, lambda manifest: None, "compute.pt2")
    assert "unpickles" in refusal(bundle, backend="torch")
    assert not mark.exists()
    assert "torch cannot open .../bundle/compute.pt2" in refusal(bundle, **TORCH)
    assert mark.exists()


def test_files(bundle: Path) -> None:
    program = bundle / "reuse.pt2"
    data = program.read_bytes()
    program.write_bytes(data[:-1])
    size = f"has {len(data) - 1} bytes, expected {len(data)}: the file is truncated. Copy it again, or export it again."
    assert refusal(bundle, **TORCH) == f".../bundle/reuse.pt2 {size}"
    edit(bundle, lambda manifest: None, "reuse.pt2")
    assert refusal(bundle, **TORCH).startswith("torch cannot open .../bundle/reuse.pt2 (written with torch 2.")
    program.unlink()
    assert refusal(bundle, **TORCH) == ".../bundle/reuse.pt2 is missing; the bundle is incomplete. Copy it again, or export it again."


def _tensor(manifest: dict[str, Any], **changes: Any) -> None:
    manifest["weights"]["tensors"]["head.weight"].update(changes)


@pytest.mark.parametrize(("change", "message"), [
    (lambda m: m.update(graph_format="tf"), "graph_format must be one of onnx, pt2, aoti, got 'tf'."),
    (lambda m: m.pop("device"), "manifest.json has no device."),
    (lambda m: m.update(device="abacus:0"), "was exported for device abacus:0, which is not available: "),
    (lambda m: m.update(device="meta"), "was exported for device meta, which is not available: "),
    (lambda m: m.pop("weights"), "manifest.json has no entry for the weights."),
    (lambda m: m["weights"].update(file="../weights.bin"), "manifest.json has no entry for the weights."),
    (lambda m: m["weights"]["tensors"].pop("head.bias"), "compute.pt2 reads the weight head.bias, which is not in "
                                                         "the bundle."),
    (lambda m: _tensor(m, offset=10**9), "the weight head.weight in weights.bin: bytes 1000000000 to 1000000128 are outside"),
    (lambda m: _tensor(m, offset=-4), "in weights.bin: bytes -4 to 124 are outside"),
    (lambda m: _tensor(m, offset=2), "invalid entry for the weight head.weight in weights.bin: "),
    (lambda m: _tensor(m, dtype="nn"), "invalid entry for the weight head.weight in weights.bin: "),
    (lambda m: _tensor(m, order=[0, 0]), "invalid entry for the weight head.weight in weights.bin: "),
    (lambda m: _tensor(m, shape=[-4, -8]), "invalid entry for the weight head.weight in weights.bin: "),
    (lambda m: m["graphs"]["reuse"].pop("weights"), "does not list the weights of the reuse graph."),
    (lambda m: m["graphs"]["reuse"]["inputs"].pop(), "reuse.pt2 has 6 inputs, but the manifest lists 5."),
    (lambda m: m["slots"][0].update(order=[0, 0, 1]), "has no memory layout for output_0."),
    (lambda m: m["inputs"][0].pop("order"), "has no memory layout for x."),
])  # fmt: skip
def test_manifests(bundle: Path, change: Edit, message: str) -> None:
    edit(bundle, change)
    assert message in refusal(bundle, **TORCH)


def test_a_failed_export_leaves_what_was_there(cached: bw.CachedModel, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: file_hash(path) for path in bundle.iterdir()}

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "check_runs", interrupted)
    for folder in (bundle, bundle.parent / "new"):
        with pytest.raises(KeyboardInterrupt):
            bw.export(cached, folder, format="pt2")
    assert {path.name: file_hash(path) for path in bundle.iterdir()} == before
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_guarded_is_onnx(cached: bw.CachedModel, tmp_path: Path) -> None:
    with pytest.raises(bw.ConfigError, match='guarded=True requires format="onnx"'):
        bw.export(cached, tmp_path / "bundle", format="pt2", guarded=True)
