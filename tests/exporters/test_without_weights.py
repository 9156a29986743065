"""Bundles without their weights: completed from the model's own files, they are what a full export writes, or nothing changes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from expecttest import assert_expected_inline
from safetensors.torch import save_file
from torch import Tensor, nn

import bwcache_compile as bw
from bwcache_compile.bundle import add_weights as adding
from bwcache_compile.bundle.files import open_bundle
from bwcache_compile.bundle.manifest import WeightSourcesEntry
from bwcache_compile.bundle.stored_tensors import StoredTensor, stored_tensors
from bwcache_compile.bundle.tensor_dtypes import FLOATS, converted
from bwcache_compile.exporters.onnx import export as exporting
from bwcache_compile.exporters.onnx.rewrites import SMALL
from bwcache_compile.exporters.weight_sources import keep_the_rest, plain_tensors
from bwcache_compile.exporters.weights import WeightFile
from bwcache_compile.testing import assert_cached
from tests.exporters.helpers import CONFIG, Exported, edit, opened, refusal
from tests.models import OneStream, Tiny
from tests.zoo import ZOO

FORMATS = ("onnx", "pt2")


class Odd(OneStream):
    """What weight files are made of beside parameters: tied weights, tables that no file has, slices, several layouts."""

    def __init__(self) -> None:
        super().__init__(width=32)
        self.first, self.again = nn.Linear(32, 32), nn.Linear(32, 32)
        self.again.weight = self.first.weight
        self.mix = nn.Conv1d(32, 32, 3, padding=1)
        self.mix.weight = nn.Parameter(self.mix.weight.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0))
        self.register_buffer("table", torch.linspace(0, 1, 6 * 96).view(6, 96), persistent=False)
        self.register_buffer("kept", torch.linspace(1, 2, 6 * 64).view(1, 6, 64))
        self.part = self.first.weight.detach()[8:24]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, temb = self.patch(x), self.embed(t)
        h = self.again(self.first(h)) + self.table[:, 32:64] * self.kept[..., :32]
        h = h + self.mix(h.transpose(1, 2)).transpose(1, 2) + (h @ self.part.T).mean(-1, keepdim=True)
        for block in self.blocks:
            h = block(h, temb)
        return self.head(h)


@dataclasses.dataclass(frozen=True)
class Pair:
    """One model as a full bundle and as one without its weights. Neither is to be written to."""

    model: Tiny
    full: Path
    less: Path

    def copy(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.less, folder / "bundle"))


def export_less(model: Tiny, folder: Path, graph_format: str = "pt2") -> Path:
    """Write a bundle without its weights."""
    cached = bw.transform(model.eval(), CONFIG, example_args=model.example())
    bw.export(cached, folder / graph_format, graph_format, include_weights=False)
    return folder / graph_format


@pytest.fixture(scope="module", params=FORMATS)
def odd(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    model, folder = Odd().eval(), tmp_path_factory.mktemp(request.param)
    cached = bw.transform(model, CONFIG, example_args=model.example())
    bw.export(cached, folder / "full", request.param)
    bw.export(cached, folder / "less", request.param, include_weights=False)
    return Pair(model, folder / "full", folder / "less")


@pytest.fixture(scope="module")
def plain(deployed: Exported, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    model, folder = deployed.cached.original, tmp_path_factory.mktemp("plain")
    assert isinstance(model, OneStream)
    bw.export(deployed.cached, folder / "less", guarded=True, include_weights=False)
    return Pair(model, deployed.folder, folder / "less")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_complete(pair: Pair, bundle: Path) -> None:
    """A completed bundle holds the files of a full one, of the same bytes; its manifest says in addition what they are made of."""
    full, completed = content(pair.full), content(bundle)
    manifests = [json.loads(files.pop("manifest.json")) for files in (full, completed)]
    assert manifests[1].pop("weight_sources")["file"] == "weights.bin"
    rest = completed.pop("constants.bin", None)
    assert (manifests[1]["files"].pop("constants.bin", None) is None) == (rest is None)
    assert completed == full
    for manifest in manifests:
        del manifest["sha256"]
    assert manifests[0] == manifests[1]


def run(bundle: Path, model: Tiny, batch: int = 1, guarded: bool = False) -> list[Any]:
    session = bw.load(bundle, allow_code=True, guarded=guarded)
    return [np.asarray(session(*(value.numpy() for value in model.example(batch, step)))) for step in range(6)]


def saved(model: nn.Module, path: Path, dtype: torch.dtype | None = None, without: tuple[str, ...] = ()) -> Path:
    """Save a model as a safetensors file, as diffusers does: of tied weights one stays."""
    tensors = {key: value.to(dtype or value.dtype).contiguous() for key, value in model.state_dict().items() if key not in without}
    save_file(tensors, path)
    return path


def sharded(model: nn.Module, folder: Path) -> Path:
    """Save a model as two shards and their index."""
    folder.mkdir()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    tensors = list(model.state_dict().items())
    places = {}
    for name, part in zip(names, (tensors[::2], tensors[1::2]), strict=True):
        save_file({key: value.contiguous().clone() for key, value in part}, folder / name)
        places |= {key: name for key, _ in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def refused(bundle: Path, source: Path) -> str:
    """Return why a source is refused; nothing may change."""
    before = content(bundle)
    with pytest.raises(bw.BundleError) as error:
        bw.add_weights(bundle, source)
    assert content(bundle) == before
    return str(error.value).replace(f"{bundle.parent}/", "")


def test_a_completed_bundle_is_what_a_full_export_writes(odd: Pair, tmp_path: Path) -> None:
    bundle = odd.copy(tmp_path)
    assert "weights.bin" not in content(bundle)
    manifest = bw.add_weights(bundle, saved(odd.model, tmp_path / "model.safetensors", without=("first.weight",)))
    assert manifest == open_bundle(bundle).manifest
    check_complete(odd, bundle)
    for one, other in zip(run(bundle, odd.model), run(odd.full, odd.model), strict=True):
        assert np.array_equal(one, other)
    assert manifest.self_check == open_bundle(odd.full).manifest.self_check


def test_what_is_kept(odd: Pair) -> None:
    """A table that is not persistent, and a slice of a weight; what is tied has two names."""
    sources = open_bundle(odd.less, weights=False).manifest.weight_sources
    assert sources is not None
    keys = {entry.keys for entry in sources.tensors}
    assert ("first.weight", "again.weight") in keys
    assert {("mix.weight",), ("kept",)} <= keys
    constants = (odd.less / "constants.bin").read_bytes()
    assert sources.constants == "constants.bin"
    assert isinstance(odd.model, Odd)
    for tensor in (odd.model.table, odd.model.part, odd.model.part.T):
        assert isinstance(tensor, Tensor)
    assert odd.model.table.numpy().tobytes() in constants
    assert any(part.contiguous().numpy().tobytes() in constants for part in (odd.model.part, odd.model.part.T))
    assert len(constants) < 2 * (odd.model.table.nbytes + odd.model.part.nbytes)
    assert all(key in odd.model.state_dict() for entry in sources.tensors for key in entry.keys)


@pytest.mark.parametrize("named", ["folder", "index"])
def test_shards(odd: Pair, named: str, tmp_path: Path) -> None:
    bundle, source = odd.copy(tmp_path), sharded(odd.model, tmp_path / "transformer")
    bw.add_weights(bundle, source if named == "folder" else source / "model.safetensors.index.json")
    check_complete(odd, bundle)


def test_the_guarded_graph(plain: Pair, tmp_path: Path) -> None:
    bundle = plain.copy(tmp_path)
    (tmp_path / "transformer").mkdir()
    saved(plain.model, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    bw.add_weights(bundle, tmp_path / "transformer")
    check_complete(plain, bundle)
    assert all(map(np.array_equal, run(bundle, plain.model, 2, guarded=True), run(plain.full, plain.model, 2, guarded=True)))


def test_a_model_that_was_loaded_in_bfloat16(tmp_path: Path) -> None:
    """Its file is in float32, all but one tensor, which the model keeps in float32 too."""
    original, model = OneStream(width=32), OneStream(width=32).bfloat16()
    model.head = original.head

    def forward(x: Tensor, t: Tensor) -> Tensor:
        h, temb = model.patch(x.bfloat16()), model.embed(t.bfloat16())
        for block in model.blocks:
            h = block(h, temb)
        return model.head(h.float())

    model.forward = forward  # type: ignore[method-assign]
    bundle = export_less(model, tmp_path)
    bw.add_weights(bundle, saved(original, tmp_path / "model.safetensors"))
    assert opened(bundle)(*model.example()).equal(model(*model.example()))


def test_a_model_that_was_loaded_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file is in float16; one tensor of it is held at a time."""
    monkeypatch.setattr("bwcache_compile.bundle.tensor_dtypes._AT_ONCE", 2**16)
    model = OneStream(depth=4, width=512).half()
    source = saved(model, tmp_path / "model.safetensors")
    bundle = export_less(model.float(), tmp_path)
    tracemalloc.start()
    manifest = bw.add_weights(bundle, source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest = 4 * 512**2
    assert largest < peak < 3 * largest < manifest.files["weights.bin"].bytes / 2


def test_a_file_in_a_wider_dtype(plain: Pair, tmp_path: Path) -> None:
    bundle = plain.copy(tmp_path)
    said = "model.safetensors has other weights than the OneStream that was exported:\n  blocks.0.up.weight, "
    assert refused(bundle, saved(plain.model, tmp_path / "model.safetensors", torch.bfloat16)).startswith(said)
    bw.add_weights(bundle, saved(plain.model, tmp_path / "model.safetensors", torch.float64))
    check_complete(plain, bundle)


@pytest.mark.parametrize("wanted", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_values_are_rounded_as_torch_does(dtype: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Normal ones, ties, subnormal ones, those that are too large, and infinities; in several parts."""
    monkeypatch.setattr("bwcache_compile.bundle.tensor_dtypes._AT_ONCE", 1000)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(4000, generator=generator, dtype=torch.float64) * 2.0 ** torch.randint(-160, 140, (4000,), generator=generator)
    ties = 1 + torch.arange(64).double() / 512
    edges = torch.tensor([0.0, -0.0, math.inf, -math.inf, 65504, 65519, 65520, 3.3895e38, 2.0**-24, 2.0**-25, 2.0**-133, math.nan])
    values = torch.cat([drawn, ties, ties * 2.0**-20, edges.double()]).to(getattr(torch, dtype))
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    raw = values.view(integers[values.itemsize]).numpy()
    if dtype == wanted:
        return
    expected = values.to(getattr(torch, wanted))
    actual = torch.from_numpy(converted(raw.view(f"<u{values.itemsize}"), dtype, wanted).view(f"<i{expected.itemsize}"))
    actual = actual.view(expected.dtype)
    assert torch.equal(actual.isnan(), expected.isnan())
    bits = integers[expected.itemsize]
    assert torch.equal(actual[~actual.isnan()].view(bits), expected[~expected.isnan()].view(bits))


def test_every_runtime_and_command_says_what_is_missing(plain: Pair, tmp_path: Path) -> None:
    from bwcache_compile.exporters import tensorrt

    bundle = plain.copy(tmp_path)
    said = (
        ".../bundle was exported without its weights, and weights.bin was not added since. Write it from the model's safetensors files:"
        " bwcache add-weights .../bundle SOURCE, or bwcache_compile.add_weights('.../bundle', SOURCE)."
    )
    assert refusal(bundle) == said
    assert refusal(bundle, verify_hashes=False) == said
    assert refusal(bundle, backend="openvino") == said
    with pytest.raises(bw.BundleError, match="was exported without its weights"):
        tensorrt.prepare(bundle)
    assert open_bundle(bundle, weights=False).manifest.model == "OneStream"
    assert_cached(bundle)


def test_files_that_do_not_fit(plain: Pair, tmp_path: Path) -> None:
    bundle, source = plain.copy(tmp_path), tmp_path / "model.safetensors"
    state = {key: value.clone() for key, value in plain.model.state_dict().items()}
    messages = []

    def refuse(change: Callable[[dict[str, Tensor]], Any]) -> None:
        tensors = dict(state)
        change(tensors)
        save_file(tensors, source)
        messages.append(refused(bundle, source))

    refuse(lambda tensors: [tensors.pop(key) for key in list(tensors) if key.endswith("up.weight")])
    refuse(lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith("blocks")])
    refuse(lambda tensors: tensors.update({"blocks.0.up.weight": torch.zeros(32, 16)}))
    refuse(lambda tensors: tensors.update({"blocks.0.up.weight": torch.zeros(32, 32, dtype=torch.int32)}))
    refuse(lambda tensors: tensors.update({"blocks.0.up.weight": state["blocks.0.up.weight"] + 1e-3}))
    refuse(lambda tensors: tensors.update({key: torch.zeros(32, 32) for key in tensors if tensors[key].shape == (32, 32)}))
    assert_expected_inline(
        "\n".join(messages),
        """\
model.safetensors lacks 3 of 6 tensors of the OneStream that was exported:
  blocks.0.up.weight, blocks.1.up.weight, blocks.2.up.weight
  Pass the files that it was loaded from. If adapters or layers were fused in it since, save its state dict and pass that file.
model.safetensors lacks 6 of 6 tensors of the OneStream that was exported:
  blocks.0.up.weight, blocks.0.down.weight, blocks.1.up.weight ...
  Pass the files that it was loaded from. If adapters or layers were fused in it since, save its state dict and pass that file.
model.safetensors has other shapes for 1 of 6 tensors of the OneStream that was exported:
  blocks.0.up.weight is [32, 16] instead of [32, 32]
  Pass the files that it was loaded from. If adapters or layers were fused in it since, save its state dict and pass that file.
model.safetensors has other dtypes for 1 of 6 tensors of the OneStream that was exported:
  blocks.0.up.weight is int32 instead of float32
  Pass the files that it was loaded from. If adapters or layers were fused in it since, save its state dict and pass that file.
model.safetensors has other weights than the OneStream that was exported:
  blocks.0.up.weight
  Pass the files that it was loaded from. If adapters or layers were fused in it since, save its state dict and pass that file.
  For other weights export the model that has them: the graphs hold constants that may follow from weights.
model.safetensors has other weights than the OneStream that was exported:
  blocks.0.up.weight, blocks.0.down.weight, blocks.1.up.weight and perhaps more
  Pass the files that it was loaded from. If adapters or layers were fused in it since, save its state dict and pass that file.
  For other weights export the model that has them: the graphs hold constants that may follow from weights.""",
    )


def test_sources_that_are_none(plain: Pair, tmp_path: Path) -> None:
    bundle, repository = plain.copy(tmp_path), tmp_path / "repository"
    repository.mkdir()
    messages = [refused(bundle, tmp_path / "nowhere"), refused(bundle, repository)]
    shards = sharded(plain.model, repository / "transformer")
    messages.append(refused(bundle, repository))
    one, two = sorted(shards.glob("*.safetensors"))
    two.rename(tmp_path / "away")
    messages.append(refused(bundle, shards))
    (tmp_path / "away").rename(two)
    data = one.read_bytes()
    for damaged in (data[:-1], data[:100], b"", b"\x04" + bytes(7) + b"null", data.replace(b'"F32"', b'"F16"', 1)):
        one.write_bytes(damaged)
        messages.append(refused(bundle, shards))
    index = shards / "model.safetensors.index.json"
    for text in ("{", '{"weight_map": {"a": "../b"}}', "[]"):
        index.write_text(text)
        messages.append(refused(bundle, shards))
    index.unlink()
    messages.append(refused(bundle, shards))
    assert_expected_inline(
        "\n".join(messages),
        """\
cannot read nowhere: [Errno 2] No such file or directory: 'nowhere'.
repository holds no safetensors file and no index of shards.
repository holds no safetensors file and no index of shards. Its folders transformer hold some: pass the one of the model.
repository/transformer lacks model-00002-of-00002.safetensors of the 2 shards that model.safetensors.index.json lists.
repository/transformer/model-00001-of-00002.safetensors has 26455 bytes, but the tensor time.weight ends at 26456: the file is truncated.
repository/transformer/model-00001-of-00002.safetensors is not a safetensors file, or it is truncated.
repository/transformer/model-00001-of-00002.safetensors is not a safetensors file, or it is truncated.
repository/transformer/model-00001-of-00002.safetensors is damaged: expected a JSON object, got None.
repository/transformer/model-00001-of-00002.safetensors is damaged: invalid entry for the tensor blocks.0.down.weight.
repository/transformer/model.safetensors.index.json is damaged: Expecting property name enclosed in double quotes: line 1 column 2 (char 1).
repository/transformer/model.safetensors.index.json is not an index of shards: its weight_map names no files beside it.
repository/transformer/model.safetensors.index.json is damaged: expected a JSON object, got [].
repository/transformer holds model-00001-of-00002.safetensors, model-00002-of-00002.safetensors. Pass one of these files.""",
    )


def test_manifests_that_contradict_themselves(plain: Pair, tmp_path: Path) -> None:
    source = saved(plain.model, tmp_path / "model.safetensors")
    changes: list[Callable[[dict[str, Any]], Any]] = [
        lambda sources: sources["tensors"][1].update(offset=10**15),
        lambda sources: sources["tensors"][1].update(offset=0),
        lambda sources: sources["tensors"][0].update(offset=-4096),
        lambda sources: sources["tensors"][0].update(keys=[]),
        lambda sources: sources["tensors"][0].update(dtype="float4"),
        lambda sources: sources["tensors"][0].update(order=[0, 0]),
        lambda sources: sources["tensors"].pop(),
        lambda sources: sources["kept"].append({"offset": 0, "bytes": 10}),
        lambda sources: sources["kept"].append({"offset": 0, "bytes": -10}),
    ]
    for i, change in enumerate(changes):
        bundle = plain.copy(tmp_path / str(i))
        edit(bundle, lambda manifest, change=change: change(manifest["weight_sources"]))  # type: ignore[misc]
        assert refused(bundle, source) == "bundle/manifest.json: weight_sources do not describe weights.bin."
    for name, change in (("file", "other.bin"), ("constants", "../constants.bin")):
        bundle = plain.copy(tmp_path / name)
        edit(bundle, lambda manifest, name=name, change=change: manifest["weight_sources"].update({name: change}))  # type: ignore[misc]
        said = f"bundle/manifest.json: weight_sources names '{change}', which is not among the bundle's files."
        assert refused(bundle, source) == said
    bundle = plain.copy(tmp_path / "hash")
    edit(bundle, lambda manifest: manifest["files"]["weights.bin"].update(sha256="0" * 64))
    assert refused(bundle, source).endswith("weight_sources do not describe weights.bin, whose SHA-256 would be another one.")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_completion_that_is_interrupted(plain: Pair, error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, source = plain.copy(tmp_path), saved(plain.model, tmp_path / "model.safetensors")
    before, written = content(bundle), []

    def write(self: Any, offset: int, data: Any) -> None:
        written.append(offset)
        if len(written) == 4:
            raise error
        whole(self, offset, data)

    whole = adding._Written.write
    monkeypatch.setattr(adding._Written, "write", write)
    with pytest.raises((KeyboardInterrupt, bw.BundleError), match=r"^$|cannot write .*weights\.bin: .*No space left on device"):
        bw.add_weights(bundle, source)
    assert content(bundle) == before
    monkeypatch.undo()
    bw.add_weights(bundle, source)
    check_complete(plain, bundle)


def test_weights_that_are_there(plain: Pair, tmp_path: Path) -> None:
    """Those that are right stay, damaged ones are written again, and a bundle with weights of its own needs none."""
    bundle, source = plain.copy(tmp_path), saved(plain.model, tmp_path / "model.safetensors")
    bw.add_weights(bundle, source)
    written = (bundle / "weights.bin").stat().st_ino
    bw.add_weights(bundle, source)
    assert (bundle / "weights.bin").stat().st_ino == written
    for damaged in ((bundle / "weights.bin").read_bytes()[:-5], bytes((bundle / "weights.bin").stat().st_size)):
        (bundle / "weights.bin").write_bytes(damaged)
        with pytest.raises(bw.BundleError):
            bw.load(bundle)
        bw.add_weights(bundle, source)
        check_complete(plain, bundle)
    with pytest.raises(bw.BundleError, match=r"/bundle was exported with its weights; there are none to add\."):
        bw.add_weights(plain.full, source)
    (bundle / "compute.onnx").write_bytes(b"")
    assert "compute.onnx has 0 bytes" in refused(bundle, source)


def test_neither_torch_nor_safetensors_is_needed(plain: Pair, tmp_path: Path) -> None:
    bundle, source = plain.copy(tmp_path), saved(plain.model, tmp_path / "model.safetensors", torch.float64)
    code = (
        "import sys\nsys.modules.update(torch=None, safetensors=None, ml_dtypes=None)\nimport bwcache_compile as bw, numpy as np\n"
        f"bw.add_weights({str(bundle)!r}, {str(source)!r})\nsession = bw.load({str(bundle)!r})\n"
        "for step in range(4):\n    session(np.ones((2, 6, 4), 'float32'), np.full(2, 1 - step / 8, 'float32'))\n"
        "print(session.report())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(bw.__file__).parents[1])
    assert (done.stdout.strip(), done.stderr) == ("default: 2 computed, 2 reused  ##..", "")
    check_complete(plain, bundle)


def test_weights_that_no_file_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Odd()
    with WeightFile(tmp_path / "weights.bin") as weights:
        for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers()), "part": model.part}.items():
            weights.add(name, tensor)
    keep_the_rest(weights, plain_tensors(model.state_dict()), "Odd")  # warns of nothing, which would be an error here
    monkeypatch.setattr("bwcache_compile.exporters.weight_sources._WORTH_SAYING", 1024)
    kept = r"^9% of the weights of Odd \(4\.25 KiB\) stay in the bundle, in constants\.bin: they are no tensors of its state dict,"
    with pytest.warns(bw.CacheWarning, match=kept + r" so no file .*\. The largest: table \(2\.25 KiB\), part \(2\.00 KiB\)\.$"):
        keep_the_rest(weights, plain_tensors(model.state_dict()), "Odd")


def test_views_of_a_weight_are_described(tmp_path: Path) -> None:
    """In any order, with dimensions joined, and as a copy. A part of a weight is kept, and so is one with a dimension split in two."""
    weight = torch.arange(120).float().view(2, 3, 4, 5)
    state = {"plain": weight, "last": (weight + 1000).to(memory_format=torch.channels_last), "one": torch.ones(1, 7, 1)}
    whole = [state[key].permute(order) for key in ("plain", "last") for order in itertools.permutations(range(4))]
    whole += [
        weight.flatten(1),
        weight.flatten(1).T,
        weight.flatten(0, 1).permute(2, 0, 1),
        state["one"].view(7),
        weight.clone().permute(3, 2, 1, 0),
    ]
    for view in whole:
        assert described(view, state, tmp_path).kept == (), (view.shape, view.stride())
    for part in (weight[1], weight[..., :2], weight.view(2, 3, 2, 2, 5).permute(2, 0, 1, 3, 4)):
        assert described(part, state, tmp_path).tensors == ()


def described(view: Tensor, state: dict[str, Tensor], folder: Path) -> WeightSourcesEntry:
    """Describe a weight file that holds one tensor; what it says makes its bytes."""
    with WeightFile(folder / "weights.bin") as weights:
        data = view.contiguous().numpy().tobytes()
        weights.place(data, "weight", view)
    sources = keep_the_rest(weights, state, "Model")
    for entry in sources.tensors:
        assert state[entry.keys[0]].numpy().transpose(entry.order).tobytes() == data
    return sources


def test_quantized_weights_are_refused() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    weight = TwoTensor(torch.ones(2), torch.ones(2))
    with pytest.raises(bw.ExportError, match=r"^weight up\.weight is of type TwoTensor, .*\. Export with include_weights=True\.$"):
        plain_tensors({"up.weight": weight})
    named = plain_tensors({"blocks.0._orig_mod.up.weight": torch.ones(2), "blocks.0._extra_state": 3})
    assert list(named) == ["blocks.0.up.weight"]


def test_graphs_that_hold_every_weight_themselves(tmp_path: Path) -> None:
    """ONNX graphs hold tensors of up to 1 KiB: there is nothing to add, and it is added."""
    model = OneStream()
    bundle = export_less(model, tmp_path, "onnx")
    assert bw.add_weights(bundle, saved(model, tmp_path / "model.safetensors")).files["weights.bin"].bytes == 0
    assert (bundle / "weights.bin").read_bytes() == b""
    assert len(run(bundle, model)) == 6


def test_tensors_are_read_as_they_are_stored(tmp_path: Path) -> None:
    tensors = {
        "none": torch.zeros(0, 3),
        "one": torch.tensor(2.5),
        "flags": torch.tensor([True, False, True]),
        "half": torch.randn(3, 5).bfloat16(),
        "pairs": torch.randn(2, 2, dtype=torch.complex64),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    read = stored_tensors(tmp_path / "a.safetensors")
    assert {key: (entry.dtype, entry.shape) for key, entry in read.items()} == {
        key: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for key, tensor in tensors.items()
    }
    for key, tensor in tensors.items():
        assert isinstance(read[key], StoredTensor)
        assert read[key].read().tobytes() == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def turned(value: Tensor) -> Tensor:
    return value.permute(*reversed(range(value.dim())))


@pytest.mark.zoo
@pytest.mark.parametrize("name", ZOO)
def test_every_parameter_of_a_real_model_is_left_out(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stays are tables."""
    monkeypatch.setattr(exporting, "check_runs", lambda *_: {})  # what the bundle computes is tested elsewhere
    entry = ZOO[name]
    model = entry.make().eval().requires_grad_(False)
    source = saved(model, tmp_path / "model.safetensors")
    cached = bw.transform(model, CONFIG, example_kwargs=entry.call(0))
    bw.export(cached, tmp_path / "bundle", include_weights=False)
    sources = bw.add_weights(tmp_path / "bundle", source).weight_sources
    assert sources is not None
    assert sources.tensors
    constants = (tmp_path / "bundle" / sources.constants).read_bytes() if sources.constants else b""
    large = [value for value in model.state_dict().values() if value.nbytes > SMALL]
    assert not any(form.contiguous().numpy().tobytes() in constants for value in large for form in (value, turned(value)))
    assert len(sources.kept) <= 8


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles with g++, which is not installed")
def test_a_package(tmp_path: Path) -> None:
    model = Odd().eval()
    cached = bw.transform(model, CONFIG, example_args=model.example())
    full = bw.export(cached, tmp_path / "full", "aoti")
    bw.export(cached, tmp_path / "less", "aoti", include_weights=False)
    bw.add_weights(tmp_path / "less", saved(model, tmp_path / "model.safetensors", without=("again.weight",)))
    assert (tmp_path / "less" / "weights.bin").read_bytes() == (tmp_path / "full" / "weights.bin").read_bytes()
    assert open_bundle(tmp_path / "less").manifest.weights == full.weights
    assert all(map(np.array_equal, run(tmp_path / "less", model), run(tmp_path / "full", model)))
