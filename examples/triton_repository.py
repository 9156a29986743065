"""Write a Triton Inference Server model repository from a bundle's guarded graph.

`python examples/triton_repository.py BUNDLE REPOSITORY --name video --size "x[1]=1024"`. Needs onnx_ir and numpy, no torch and no
server. No Triton server has run the result yet: see docs/tensorrt.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bwcache_compile.bundle.arithmetic import arithmetic
from bwcache_compile.bundle.call import PAIRS, graph_shape
from bwcache_compile.bundle.dynamic_shapes import symbols_at
from bwcache_compile.bundle.external_data import external_locations
from bwcache_compile.bundle.files import Bundle, open_bundle
from bwcache_compile.bundle.manifest import Size
from bwcache_compile.bundle.settings import policy_inputs
from bwcache_compile.errors import ConfigError
from bwcache_compile.graph_io import INDICATOR, STEP, UNTIL, cache_in, cache_out

CONTROLS = {"START": "bool", "END": "bool", "CORRID": "uint64"}
"""The inputs that Triton fills in itself. A started sequence computes; the other two are for whoever changes the graph."""
_TYPES = {"bool": "BOOL", "bfloat16": "BF16", "float16": "FP16", "float32": "FP32", "float64": "FP64"}


class _Word(str):
    """Text that stands without quotes in a configuration."""


def _type(dtype: str) -> _Word:
    return _Word(f"TYPE_{_TYPES.get(dtype, dtype.upper())}")


def _text(message: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Write a message in protobuf's text format; a list of messages is a repeated field."""
    for key, value in message.items():
        items = value if isinstance(value, list) and value and isinstance(value[0], dict) else [value]
        for item in items:
            if isinstance(item, dict):
                yield f"{indent}{key} {{"
                yield from _text(item, indent + "  ")
                yield f"{indent}}}"
            elif isinstance(item, list):
                yield f"{indent}{key}: [{', '.join(str(part).lower() for part in item)}]"
            elif isinstance(item, str) and not isinstance(item, _Word):
                yield f'{indent}{key}: "{item}"'
            else:
                yield f"{indent}{key}: {str(item).lower() if isinstance(item, bool) else item}"


def _tensor(name: str, dtype: str, dims: list[int]) -> dict[str, Any]:
    described: dict[str, Any] = {"name": name, "data_type": _type(dtype), "dims": dims or [1]}
    return described if dims else {**described, "reshape": {"shape": []}}


def _state(name: str, dtype: str, dims: list[int], fill: float) -> dict[str, Any]:
    start: dict[str, Any] = {"name": name, "data_type": _type(dtype), "dims": dims}
    start |= {"data_file": name} if fill else {"zero_data": True}
    kind = {"data_type": _type(dtype), "dims": dims}
    return {"input_name": cache_in(name), "output_name": cache_out(name), **kind, "initial_state": start}


def _bytes(dtype: str, dims: list[int], fill: float) -> bytes:
    if dtype == "bfloat16":  # numpy has none: the upper half of a float32
        return (np.full(dims, fill, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return np.full(dims, fill, dtype=dtype).tobytes()


def _with_controls(bundle: Bundle) -> Any:
    """Return the guarded graph with Triton's control inputs: where START is true, it computes whatever the state says."""
    import onnx_ir as ir

    model = ir.load(bundle.graph_file("guarded"))
    graph = model.graph
    kinds = {name: ir.TensorType(ir.DataType[dtype.upper()]) for name, dtype in CONTROLS.items()}
    values = {name: ir.Value(name=name, shape=ir.Shape([1]), type=kind) for name, kind in kinds.items()}
    guard = graph.node("guard")
    going = ir.node("Not", [values["START"]], name="going_on")
    flat = ir.node("Squeeze", [going.outputs[0]], name="going_on_flat")
    both = ir.node("And", [guard.inputs[0], flat.outputs[0]], name="reuses_going_on")
    for node in (going, flat, both):
        node.outputs[0].name = node.name
    graph.insert_before(guard, [going, flat, both])
    guard.replace_input_with(0, both.outputs[0])
    graph.inputs.extend(values.values())
    return model


def write(
    bundle: str | Path, directory: str | Path, *, name: str = "model", sizes: Mapping[str, int] | None = None, idle_seconds: float = 60.0
) -> Path:
    """Write a model repository entry for Triton's ONNX Runtime backend: one sequence is one generation of one context.

    Triton keeps every cache slot as implicit state and starts it anew with each sequence. A request holds the model's inputs,
    `step` and the policy's parameters, all of fixed shape: the cache is as large as the inputs, and a started sequence's
    state must have its size. Write one entry for each size.

    Args:
        bundle: What `export(..., guarded=True)` wrote.
        directory: The model repository; gets a folder `name`, which must not be there yet.
        name: Of the model.
        sizes: Of a dynamic size, by the input and dimension that it is read from (`"x[1]"`); the captured one by default.
        idle_seconds: How long a sequence may wait for its next step before Triton drops it.

    Returns:
        The folder of the model.

    Raises:
        BundleError: The bundle has no guarded graph.
        ConfigError: The folder is there, a size is unknown, or the graphs do not hold there.
    """
    import onnx_ir as ir

    opened = open_bundle(bundle)
    manifest, model = opened.manifest, _with_controls(opened)
    target = Path(directory) / name
    if target.exists():
        raise ConfigError(f"{target} exists; it is not overwritten. Choose another name, or remove it.")
    if manifest.values:
        built_in = ", ".join(entry.input for entry in manifest.values)
        raise ConfigError(f"the values of {built_in} are built into the graphs, and a server compares none. Run the bundle by bw.load.")
    known = symbols_at(manifest, sizes or {})

    def dims(shape: Sequence[Size]) -> list[int]:
        return [arithmetic(size, known) for size in shape]

    slots = [(slot.name, slot.dtype, dims(slot.shape), float(slot.fill)) for slot in manifest.slots]
    slots.append((UNTIL, "int64", [1], -1.0))
    inputs = [(entry.name, PAIRS.get(entry.dtype, entry.dtype), dims(graph_shape(entry))) for entry in manifest.inputs]
    inputs += [(entry.name, entry.dtype, list(entry.shape)) for entry in policy_inputs(manifest.config)]
    inputs.append((STEP, "int64", [1]))
    taken = set(manifest.graphs["guarded"].inputs)
    outputs = [(item.name, item.dtype, dims(item.shape)) for item in manifest.outputs.items]
    outputs += [(INDICATOR, "float32", [len(manifest.measured)])] if manifest.measured else []
    controls: list[dict[str, Any]] = [
        {"name": "START", "control": {"kind": _Word("CONTROL_SEQUENCE_START"), "bool_false_true": [False, True]}},
        {"name": "END", "control": {"kind": _Word("CONTROL_SEQUENCE_END"), "bool_false_true": [False, True]}},
        {"name": "CORRID", "control": {"kind": _Word("CONTROL_SEQUENCE_CORRID"), "data_type": _type(CONTROLS["CORRID"])}},
    ]
    config = {
        "name": name,
        "backend": "onnxruntime",
        "max_batch_size": 0,
        "input": [_tensor(*entry) for entry in inputs if entry[0] in taken],
        "output": [_tensor(*entry) for entry in outputs],
        "sequence_batching": {
            "max_sequence_idle_microseconds": round(idle_seconds * 1e6),
            "direct": {},
            "control_input": controls,
            "state": [_state(*slot) for slot in slots],
        },
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=target.parent))
    try:
        version, initial = place / "1", place / "initial_state"
        version.mkdir()
        initial.mkdir()
        ir.save(model, version / "model.onnx")
        for file in external_locations(opened.graph_file("guarded").read_bytes()):
            shutil.copyfile(opened.folder / file, version / file)
        for slot, dtype, shape, fill in slots:
            if fill:
                (initial / slot).write_bytes(_bytes(dtype, shape, fill))
        (place / "config.pbtxt").write_text("\n".join(_text(config)) + "\n")
        place.chmod(0o755)
        os.rename(place, target)
    except BaseException:
        shutil.rmtree(place)
        raise
    return target


def main() -> None:
    """Write the repository that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("repository", type=Path)
    parser.add_argument("--name", required=True, help="the model's name in the repository")
    parser.add_argument("--size", action="append", default=[], metavar="INPUT[DIMENSION]=N", help="a dynamic size, where there is one")
    asked = parser.parse_args()
    sizes = dict(size.split("=") for size in asked.size)
    print(write(asked.bundle, asked.repository, name=asked.name, sizes={name: int(size) for name, size in sizes.items()}))


if __name__ == "__main__":
    main()
