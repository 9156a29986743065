"""A compute graph as stages: run one after another they are the graph, and there are as many kinds of them at any depth."""

from __future__ import annotations

import itertools
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

import bwcache_compile as bw
from bwcache_compile.bundle.manifest import CallEntry, SequenceEntry
from bwcache_compile.bundle.runners.sequence import PackageSequence
from bwcache_compile.exporters.graphs import PlainGraph, exported_graph, plain_graph, under_autocast
from bwcache_compile.exporters.torch.package import torch_graph
from bwcache_compile.exporters.torch.sequence import Package, package_names
from bwcache_compile.exporters.torch.stages import Stages, split_blocks
from bwcache_compile.exporters.write import new_bundle, write_manifest
from bwcache_compile.ir.sizes import shape_of
from bwcache_compile.passes import outlined
from bwcache_compile.size_expressions import evaluated
from tests.exporters.helpers import CONFIG, Edit, edit, opened, plain_manifest, refusal
from tests.models import Block, InPlace, Interleaved, Numbered, OddMiddle, OneStream, Tiny, TwoStream, noise


def split(model: Tiny, *example: Tensor, config: bw.CacheConfig = CONFIG, **options: Any) -> tuple[bw.CachedModel, Stages]:
    """Return a cached model and the stages of its compute graph."""
    cached = bw.transform(model.eval(), config, example_args=example or model.example(), **options)
    return cached, split_blocks(outlined(cached.program))


def kinds(cached: bw.CachedModel, stages: Stages) -> list[str]:
    """Return which package each stage calls."""
    names = package_names(stages, cached.program)
    return [names[stage.key] for stage in stages.stages]


def runnable(cached: bw.CachedModel, stages: Stages) -> PackageSequence:
    """Return the stages as a sequence, in which one program stands for all stages that are alike."""
    packages: dict[Any, Package] = {}
    calls, opened = [], []
    for stage in stages.stages:
        if stage.key not in packages:
            plain = PlainGraph("stage", exported_graph(cached.program, stages.attributes, stage.graph), stage.inputs, stage.outputs)
            packages[stage.key] = Package("a stage", stage, torch_graph(plain), [])
        package = packages[stage.key]
        weights = package.weights_of(stage)
        calls.append(CallEntry(file=package.file, weights=tuple(weights), inputs=stage.inputs, outputs=stage.outputs))
        tensors = {**package.graph.tensors, **stages.attributes}
        opened.append((package.graph.exported.graph_module, [tensors[name] for name in weights]))
    return PackageSequence(stages.inputs, SequenceEntry(calls=tuple(calls), returned=stages.returned), opened)


def check(cached: bw.CachedModel, stages: Stages, *sizes: tuple[int, ...]) -> None:
    """The stages return the bits of the whole graph, at the captured sizes of the inputs or at others."""
    program, graph = cached.program, plain_graph(cached.program, "compute")
    symbols = program.signature.captured_sizes
    sequence = runnable(cached, stages)
    for size in sizes or (tuple(symbols.values()),):
        known = dict(zip(symbols, size, strict=True))
        values = [node.meta["val"] for node in graph.exported.graph.find_nodes(op="placeholder")][-len(graph.inputs) :]
        shapes = [evaluated(shape_of(value), known) for value in values]
        inputs = [
            torch.ones(shape, dtype=value.dtype) if not value.is_floating_point() else noise(name, 0, *shape).to(value.dtype)
            for name, shape, value in zip(graph.inputs, shapes, values, strict=True)
        ]
        with torch.no_grad(), under_autocast(program):
            expected = cached.program.compute(*inputs)
        with torch.no_grad():
            actual = sequence(*inputs)
        assert len(expected) == len(actual) == len(stages.outputs)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_as_many_kinds_at_any_depth(dynamic: bool) -> None:
    """Also with dynamic sizes, where which tokens are measured is worked out in the graph, other ones for each block."""
    found = {}
    for depth in (2, 4):
        cached, stages = split(OneStream(depth), noise("x", 0, 2, 40, 4), torch.ones(2), **({"dynamic_shapes": "auto"} if dynamic else {}))
        found[depth] = kinds(cached, stages)
        check(cached, stages, *([(2, 40), (3, 50)] if dynamic else []))
        assert [stage.block for stage in stages.stages if stage.block] == [f"blocks.{i}" for i in range(depth)]
    assert found == {
        2: ["before_blocks", "Block", "Block", "after_blocks"],
        4: ["before_blocks", "Block", "Block", "Block", "Block", "after_blocks"],
    }
    weights = next(stage.weights for stage in stages.stages if stage.block == "blocks.3")
    assert weights[:4] == ("blocks.3.up.weight", "blocks.3.up.bias", "blocks.3.down.weight", "blocks.3.down.bias")


@pytest.mark.parametrize(("model", "expected"), [
    (TwoStream(), "before_blocks DoubleBlock DoubleBlock between_blocks Block Block after_blocks"),
    (OddMiddle(), "before_blocks Block between_blocks Block after_blocks"),
    (Numbered(InPlace()), "before_blocks InPlaceBlock InPlaceBlock InPlaceBlock after_blocks"),
    (Interleaved(), "before_blocks Block Block_2 Block Block_2 after_blocks"),
], ids=["two streams", "another block between", "in place inside", "turns"])  # fmt: skip
def test_kinds(model: Tiny, expected: str) -> None:
    cached, stages = split(model)
    assert " ".join(kinds(cached, stages)) == expected
    check(cached, stages)


@pytest.mark.parametrize("config", [
    bw.CacheConfig(policy="static", steps_mask=(0, 1, 0, 1, 1)),
    bw.CacheConfig(num_steps=8, reuse="taylor"),
    bw.CacheConfig(num_steps=8, reuse="residual", indicator_tokens="all"),
], ids=["static", "taylor", "residual"])  # fmt: skip
def test_every_way_of_reuse(config: bw.CacheConfig) -> None:
    cached, stages = split(OneStream(depth=2), config=config)
    check(cached, stages)


def test_autocast() -> None:
    """Each stage is traced with the casts written out."""
    model = OneStream(depth=2).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cached, stages = split(model)
    check(cached, stages)


def test_sizes_that_no_value_shows() -> None:
    """Frames and places are multiplied before the blocks, so these take the model's input for its sizes."""
    cached, stages = split(Interleaved(), noise("x", 0, 2, 5, 7, 4), torch.ones(2), dynamic_shapes="auto")
    first = next(stage for stage in stages.stages if stage.block == "spatial.0")
    assert first.inputs[0] == "x"
    assert len(first.outputs) == 2, "the permuted stream and the measured rows, and not the stream as it was"
    check(cached, stages)


def test_values_are_dropped() -> None:
    """Each step's value is gone when the next but one runs; an output stays, and so does what is an input and an output."""
    made: dict[str, weakref.ref[Tensor]] = {}
    alive = []

    def package(name: str) -> Any:
        def run(x: Tensor) -> list[Tensor]:
            alive.append(" ".join(other for other, value in made.items() if value() is not None))
            outputs = [x + 1, x + 2]
            made[name], made[f"{name}'"] = map(weakref.ref, outputs)
            return outputs

        return run

    names = ("x", "a", "b", "c")
    calls = tuple(CallEntry(file=to, weights=(), inputs=(of,), outputs=(to, f"{to}'")) for of, to in itertools.pairwise(names))
    sequence = PackageSequence(("x",), SequenceEntry(calls=calls, returned=("c", "a'", "x")), [(package(to), []) for to in names[1:]])
    c, a, x = sequence(torch.zeros(1))
    assert (c.item(), a.item(), x.item()) == (3, 2, 0)
    assert alive == ["", "a a'", "a' b"]


class Collecting(OneStream):
    """Each block's output is written to memory that was made before the blocks."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, temb = self.patch(x), self.embed(t)
        latest = torch.zeros_like(x)
        for block in self.blocks:
            x = block(x, temb)
            latest.copy_(x)
        return self.head(x + latest)


def test_what_cannot_be_split() -> None:
    with pytest.raises(bw.ExportError) as error:
        split(Numbered(Collecting(depth=2)))
    assert_expected_inline(
        str(error.value),
        """\
the blocks of Numbered cannot be compiled apart from the rest: `zeros_like` is made in one part of the graph and written to in another.
  Export with blocks_once=False, which compiles the graph into one package.""",
    )


def test_blocks_that_are_not_alike(tmp_path: Path) -> None:
    model = OneStream(depth=2)
    model.blocks[1] = Block(8, inner=16)
    cached = bw.transform(model.eval(), CONFIG, example_args=model.example())
    with pytest.raises(bw.ExportError) as error:
        bw.export(cached, tmp_path / "bundle", format="aoti", blocks_once=True)
    with pytest.raises(bw.ConfigError) as mistake:
        bw.export(cached, tmp_path / "bundle", format="pt2", blocks_once=True)
    assert_expected_inline(
        f"{error.value}\n{mistake.value}",
        """\
no two blocks of OneStream can be compiled as one:
  blocks.0: no other block is like it
  blocks.1: no other block is like it
  Export with blocks_once=False, which compiles the graph into one package.
blocks_once=True requires format="aoti", got 'pt2'.""",
    )
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of programs, whose compute graph is made a sequence: opened and checked like packages, without a compiler."""
    model = OneStream(depth=2).eval()
    folder = tmp_path_factory.mktemp("sequences") / "bundle"
    bw.export(bw.transform(model, CONFIG, example_args=model.example()), folder, format="pt2")
    (folder / "Block").mkdir()
    (folder / "compute.pt2").rename(folder / "Block" / "package.pt2")

    def change(manifest: dict[str, Any]) -> None:
        graph = manifest["graphs"]["compute"]
        manifest["files"]["Block/package.pt2"] = manifest["files"].pop(graph.pop("file"))
        call = {"file": "Block/package.pt2", "weights": graph.pop("weights"), "inputs": graph["inputs"]}
        values = [f"value{i}" for i in range(len(graph["outputs"]))]
        graph["sequence"] = {"calls": [{**call, "outputs": values}], "returned": values}

    edit(folder, change)
    return folder


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "bundle"))


def test_a_sequence_runs(bundle: Path) -> None:
    model, session = OneStream(depth=2).eval(), opened(bundle)
    with torch.no_grad():
        assert torch.equal(session(*model.example()), model(*model.example()))


def _call(change: Edit) -> Edit:
    return lambda manifest: change(manifest["graphs"]["compute"]["sequence"]["calls"][0])


def _moved(name: str) -> Edit:
    """The bundle calls its package by another name."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"].pop("Block/package.pt2")
        manifest["graphs"]["compute"]["sequence"]["calls"][0]["file"] = name

    return change


@pytest.mark.parametrize(("change", "message"), [
    (_moved("../bundle/Block/package.pt2"), "refers to '../bundle/Block/package.pt2', which is outside the bundle."),
    (_moved("Block/../Block/package.pt2"), "refers to 'Block/../Block/package.pt2', which is outside the bundle."),
    (_moved("/etc/hostname"), "refers to '/etc/hostname', which is outside the bundle."),
    (_moved("Block//package.pt2"), "refers to 'Block//package.pt2', which is outside the bundle."),
    (_moved("Block\\package.pt2"), "which is outside the bundle."),
    (_moved("Block"), ".../bundle/Block is missing; the bundle is incomplete."),
    (_call(lambda call: call.update(file="reuse/package.pt2")), "the file of the compute graph is not among the bundle's files."),
    (_call(lambda call: call["weights"].pop()), "package.pt2 has 28 inputs, but the manifest lists 27."),
    (_call(lambda call: call["weights"].append("no.weight")), "package.pt2 reads the weight no.weight, which is not in the bundle."),
    (_call(lambda call: call["inputs"].append("y")), "the compute graph is no sequence of calls: call 0 reads y, which is not an input and"
                                                     " which no earlier call returns."),
    (_call(lambda call: call["outputs"].append("x")), "no sequence of calls: call 0 returns x, which there is already."),
    (_call(lambda call: call["outputs"].pop()), "it returns value6, which is not an input and which no call returns."),
    (lambda m: m["graphs"]["compute"]["sequence"]["returned"].pop(), "no sequence of calls: it returns 6 values, but lists 7 outputs."),
    (lambda m: m["graphs"]["compute"].pop("sequence"), "the compute graph must be either one file or a sequence of calls."),
    (lambda m: m["graphs"]["compute"].update(file="reuse.pt2"), "the compute graph must be either one file or a sequence of calls."),
    (lambda m: m.update(graph_format="onnx"), "the compute graph must be one file."),
])  # fmt: skip
def test_manifests(bundle: Path, change: Edit, message: str) -> None:
    edit(bundle, change)
    assert message in refusal(bundle, allow_code=True)


def test_files(bundle: Path) -> None:
    package, elsewhere = bundle / "Block" / "package.pt2", bundle.parent / "elsewhere"
    data = package.read_bytes()
    package.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert refusal(bundle, allow_code=True).startswith("SHA-256 mismatch for .../bundle/Block/package.pt2")
    package.write_bytes(data)
    (bundle / "Block").rename(elsewhere)
    missing = ".../bundle/Block/package.pt2 is missing; the bundle is incomplete. Copy it again, or export it again."
    assert refusal(bundle, allow_code=True) == missing
    (bundle / "Block").symlink_to(elsewhere)  # leads out of the bundle
    assert refusal(bundle, allow_code=True) == missing


def test_what_is_written_over(bundle: Path) -> None:
    """A bundle with folders is replaced whole; a file in one that is not the bundle's own is not overwritten."""
    (bundle / "Block" / "notes.txt").write_text("mine")
    with pytest.raises(bw.ExportError, match=r"contains Block/notes.txt, which does not belong to the bundle there"), new_bundle(bundle):
        pass
    (bundle / "Block" / "notes.txt").unlink()
    with new_bundle(bundle) as folder:
        (folder / "Other").mkdir()
        (folder / "Other" / "package.pt2").write_bytes(b"code")
        write_manifest(folder, plain_manifest(), {})
    assert sorted(path.name for path in bundle.iterdir()) == ["Other", "manifest.json"]
    assert list(json.loads((bundle / "manifest.json").read_text())["files"]) == ["Other/package.pt2"]
