"""The manifest as typed values: nothing is lost on the way to the file and back, and what does not fit is refused by its place."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from expecttest import assert_expected_inline

import bwcache_compile as bw
from bwcache_compile.bundle.files import open_bundle
from bwcache_compile.bundle.manifest import (
    BlockEntry,
    CallEntry,
    ConstantEntry,
    FileEntry,
    GraphEntry,
    InputEntry,
    KeptEntry,
    Manifest,
    OutputsEntry,
    SequenceEntry,
    SlotEntry,
    SourceEntry,
    SymbolEntry,
    TensorEntry,
    TensorRTEntry,
    ValueEntry,
    WeightEntry,
    WeightsEntry,
    WeightSourcesEntry,
)
from bwcache_compile.bundle.manifest_text import read_text, write_text
from bwcache_compile.exporters.write import add_files, write_manifest
from tests.exporters.helpers import plain_manifest
from tests.exporters.tampering import places

WHOLE = Manifest(
    model="Model",
    graph_format="pt2",
    opset=None,
    torch="2.0",
    arguments=("x", "t"),
    inputs=(InputEntry(name="x", dtype="int64", shape=("s0", 4), example=(2, 4), argument="more", path=("x", 0), order=(1, 0)),),
    constants=(ConstantEntry(argument="scale", path=(), value=0.5), ConstantEntry(argument="mode", path=(), value=None)),
    values=(ValueEntry(input="x", value=(True, 1, 0.5)),),
    outputs=OutputsEntry(
        form={"tuple": [{"tensor": "y"}, {"value": "inf"}]}, items=(TensorEntry(name="y", dtype="float32", shape=("s0",)),)
    ),
    symbols=(SymbolEntry(name="s0", input="x", dimension=0, example=2, factor=1, offset=0),),
    conditions=("s0 >= 2",),
    slots=(
        SlotEntry(name="a", role="output", dtype="float32", shape=("s0", 4), example=(2, 4), order=(0, 1), fill=-math.inf),
        SlotEntry(name="b", role="trigger", dtype="int64", shape=(1,), example=(1,), order=(0,), fill=0),
    ),
    config=bw.CacheConfig(threshold=math.inf, policy="static", steps_mask=(0, 1, 0)),
    blocks=(BlockEntry(name="blocks.0", type="Block"),),
    measured=("blocks.0",),
    notes=("a note",),
    graphs={
        "compute": GraphEntry(file="compute.pt2", inputs=("x", "step"), outputs=("y",), weights=("w",)),
        "sequence": GraphEntry(
            inputs=("x",),
            outputs=("y",),
            sequence=SequenceEntry(
                calls=(CallEntry(file="Block/package.pt2", weights=("w",), inputs=("x",), outputs=("a",), block="blocks.0"),),
                returned=("a",),
            ),
        ),
    },
    self_check={"steps": "##..", "sizes": [{"s0": 2}], "largest_error": 0.0},
    files={"compute.pt2": FileEntry(bytes=3, sha256="00")},
    device="cpu",
    weights=WeightsEntry(
        file="weights.bin", tensors={"w": WeightEntry(dtype="float32", shape=(2, 3), order=(1, 0), offset=4096, grad=True)}
    ),
    weight_sources=WeightSourcesEntry(
        file="weights.bin",
        tensors=(SourceEntry(offset=4096, keys=("w", "tied"), dtype="float32", shape=(2, 3), order=(1, 0), sha256="00"),),
        kept=(KeptEntry(offset=0, bytes=8),),
        constants="constants.bin",
    ),
    tensorrt=TensorRTEntry(list="10.15", unlisted=("a line",), sizes={"x[0]": (2, 4, 8)}),
)
OPTIONAL = {
    ("device",),
    ("weights",),
    ("weight_sources",),
    ("weight_sources", "constants"),
    ("tensorrt",),
    ("inputs", 0, "order"),
    ("slots", 0, "order"),
    ("slots", 1, "order"),
}
OPTIONAL |= {("graphs", "compute", "weights"), ("graphs", "compute", "file")}
OPTIONAL |= {("graphs", "sequence", "sequence"), ("graphs", "sequence", "sequence", "calls", 0, "block")}
FREE = (("self_check",), ("outputs", "form"))
"""What is inside of these is looked at elsewhere or not at all."""


def again(manifest: Manifest) -> Manifest:
    return Manifest.from_json(read_text(write_text(manifest.to_json()).encode()), "manifest")


def refusal(content: Any) -> str:
    """Return why no manifest is read of this; empty where one is."""
    try:
        Manifest.from_json(content, "manifest")
    except ValueError as error:
        return str(error)
    return ""


def fields() -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value that is typed."""
    for path in places(WHOLE.to_json()):
        if not any(path[: len(free)] == free and path != free for free in FREE):
            yield path


def altered(path: tuple[Any, ...], value: Any = None) -> tuple[Any, str]:
    """Return the JSON of the manifest with another value in one place, or without it; and how messages name the place."""
    content = copy.deepcopy(WHOLE.to_json())
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    if value is None:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return content, "manifest" + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)


def test_nothing_is_lost() -> None:
    assert again(WHOLE) == WHOLE
    assert again(again(WHOLE)) == WHOLE
    assert again(plain_manifest()) == plain_manifest()
    assert again(WHOLE).slots[0].fill == -math.inf
    assert isinstance(again(WHOLE).slots[1].fill, int)
    assert again(WHOLE).outputs.form["tuple"][1] == {"value": "inf"}, "text that a model returns is no number"


def test_absent_parts_are_left_out() -> None:
    assert not {"device", "weights", "weight_sources", "tensorrt"} & set(plain_manifest().to_json())
    assert plain_manifest().to_json()["opset"] == 20
    assert WHOLE.to_json()["opset"] is None


def test_what_is_not_known_is_written_back() -> None:
    content = WHOLE.to_json()
    content["later"] = {"a": [1, {"b": None}], "extra": 2}
    content["slots"][0]["later"] = content["graphs"]["compute"]["extra"] = "text"
    manifest = Manifest.from_json(json.loads(json.dumps(content)), "manifest")
    assert manifest.extra == {"later": content["later"]}
    assert manifest.to_json() == content


def test_a_missing_field() -> None:
    by_name = {("graphs",), ("files",), ("weights", "tensors"), ("tensorrt", "sizes")}
    for path in (path for path in fields() if isinstance(path[-1], str)):
        content, place = altered(path)
        if path[0] != "config" and (path in OPTIONAL or path[:-1] in by_name):
            assert Manifest.from_json(content, "manifest").to_json() == content
        elif path[0] != "config" or len(path) == 1:
            assert refusal(content) == f"{place.removesuffix(f'.{path[-1]}')}: {path[-1]} is missing"


@pytest.mark.parametrize("value", [[[]], {"a": [[]]}, "text", 3, 0.5, True], ids=repr)
def test_a_value_of_another_kind(value: Any) -> None:
    """Refused by its place, or of a kind that fits there, and written back as it was."""
    for path in (path for path in fields() if path[0] != "config"):
        content, place = altered(path, value)
        refused = refusal(content)
        assert refused.startswith(place) if refused else Manifest.from_json(content, "manifest").to_json() == content


def test_messages() -> None:
    changes = {
        ("inputs",): 3,
        ("inputs", 0): "x",
        ("inputs", 0, "shape", 1): 0.5,
        ("opset",): "20",
        ("slots", 0, "fill"): "much",
        ("constants", 0, "value"): [1],
        ("symbols", 0, "dimension"): True,
        ("graphs", "compute"): [],
        ("graphs", "compute", "weights"): "w",
        ("files", "compute.pt2", "bytes"): 3.5,
        ("weights", "tensors", "w", "order", 0): "0",
        ("tensorrt", "sizes", "x[0]"): [1, 2],
        ("config",): [],
        ("config", "threshold"): -1,
        ("config", "colour"): "red",
    }
    messages = [refusal(altered(path, value)[0]) for path, value in changes.items()]
    assert_expected_inline(
        "\n".join([*messages, refusal([])]),
        """\
manifest.inputs: expected a list, got 3
manifest.inputs[0]: expected a table, got 'x'
manifest.inputs[0].shape[1]: expected an integer or text, got 0.5
manifest.opset: expected an integer or null, got '20'
manifest.slots[0].fill: expected a number, got 'much'
manifest.constants[0].value: expected a flag or an integer or a number or text or null, got [1]
manifest.symbols[0].dimension: expected an integer, got True
manifest.graphs.compute: expected a table, got []
manifest.graphs.compute.weights: expected a list, got 'w'
manifest.files.compute.pt2.bytes: expected an integer, got 3.5
manifest.weights.tensors.w.order[0]: expected an integer, got '0'
manifest.tensorrt.sizes.x[0]: expected a list of 3, got [1, 2]
manifest.config: expected a table, got []
config: not valid in this version: threshold is -1; it must be a number >= 0 (0 never reuses)
config: not valid in this version: CacheConfig.__init__() got an unexpected keyword argument 'colour'
manifest: expected a table, got []""",
    )


def test_files_are_added_beside_what_was_said(tmp_path: Any) -> None:
    """Also beside what this version does not know."""
    manifest = dataclasses.replace(plain_manifest(), extra={"later": 1})
    (tmp_path / "a").write_text("a")
    write_manifest(tmp_path, manifest, {})
    written = Manifest.from_json(read_text((tmp_path / "manifest.json").read_bytes()), "manifest")
    assert written.files == {"a": FileEntry(bytes=1, sha256=written.files["a"].sha256)}
    add_files(tmp_path, {"b": "text"}, written)
    added = json.loads((tmp_path / "manifest.json").read_bytes())
    assert set(added["files"]) == {"a", "b"}
    assert added["later"] == 1
    with pytest.raises(bw.BundleError, match="there are no outputs"):
        open_bundle(tmp_path)


def test_it_needs_no_torch() -> None:
    code = "import sys, bwcache_compile.bundle.manifest; print([name for name in ('torch', 'numpy') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
