"""Export the classes of the zoo and run each bundle beside torch.

`python benchmarks/export_zoo.py --out benchmarks/results/export_zoo.json`; takes about half an hour.

For every class, at each operator set: the pair and the guarded graph over 8 steps with both branches taken, on the
inputs that the zoo draws for each step. Decisions must equal torch's; the error is the largest difference of an output
relative to its largest value. What cannot be exported is listed with the reason, and so are the operators that
TensorRT's parser does not list. Where OpenVINO is installed, it runs the same bundles.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import bwcache_compile as bw
from benchmarks import zoo_runs
from bwcache_compile.bundle.files import open_bundle
from bwcache_compile.exporters.tensorrt.operators import unlisted_operators
from tests.zoo import ZOO, Entry


def as_numpy(value: Any) -> Any:
    """Turn the tensors of an input into arrays, as a process without torch has them."""
    if isinstance(value, torch.Tensor):
        return value.numpy()
    if isinstance(value, dict):
        return {key: as_numpy(item) for key, item in value.items()}
    return type(value)(as_numpy(item) for item in value) if isinstance(value, (list, tuple)) else value


def run_forms(entry: Entry, cached: bw.CachedModel, bundle: Path, backend: str) -> dict[str, tuple[str, float]]:
    """Run the pair of graphs and the guarded one beside the model; return the decisions and the largest error of each."""
    sessions = {kind: bw.load(bundle, backend=backend, guarded=kind == "guarded") for kind in ("pair", "guarded")}
    return {kind: zoo_runs.compare(entry, cached, session, as_numpy) for kind, session in sessions.items()}


def in_openvino(entry: Entry, cached: bw.CachedModel, bundle: Path) -> dict[str, Any]:
    """Return what a row says of OpenVINO: errors by form, or what was refused. Steps that differ from torch's are refused."""
    if importlib.util.find_spec("openvino") is None:
        return {"skipped": "needs openvino"}
    try:
        return {"errors": {kind: error for kind, (_, error) in run_forms(entry, cached, bundle, "openvino").items()}}
    except (bw.BundleError, bw.StateError, bw.ConfigError, ValueError) as error:
        return zoo_runs.refused(error)


def cell(found: dict[str, Any]) -> str:
    """Return the largest error over both forms, or why there is none, for a table."""
    return f"{max(found['errors'].values()):.1e}" if "errors" in found else "refused" if "refused" in found else "-"


def run(opsets: list[int], name: str) -> dict[str, Any]:
    """Export one class at each operator set, and run what came out."""
    entry = ZOO[name]
    cached, row = zoo_runs.transformed(entry)
    for opset in opsets:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                manifest = bw.export(cached, Path(folder) / name, guarded=True, opset=opset)
                found = run_forms(entry, cached, Path(folder) / name, "onnxruntime")
                openvino = in_openvino(entry, cached, Path(folder) / name)
                size = sum(file.bytes for file in manifest.files.values())
                unlisted = sorted({f"{one.operator}: {one.reason}" for one in unlisted_operators(open_bundle(Path(folder) / name))})
            except (bw.ExportError, bw.BundleError, bw.StateError, ValueError) as error:
                row[f"opset {opset}"] = zoo_runs.refused(error)
                continue
        seconds = time.perf_counter() - began
        errors = {kind: error for kind, (_, error) in found.items()}
        row[f"opset {opset}"] = {"steps": found["pair"][0], "errors": errors, "seconds": round(seconds, 1), "bytes": size}
        row[f"opset {opset}"]["not listed by TensorRT"] = unlisted
        row[f"opset {opset}"]["openvino"] = openvino
    return row


def table(record: dict[str, Any]) -> str:
    """Return what a record says as a table: of each class, operator set and engine the largest error, over both forms and all steps."""
    opsets = sorted({key for row in record["rows"].values() for key in row if key.startswith("opset")})
    columns = [name for opset in opsets for name in (opset, f"{opset} in OpenVINO")]
    lines = ["| configuration | class | blocks | " + " | ".join(columns) + " | steps |", "|---" * (4 + len(columns)) + "|"]
    for name, row in record["rows"].items():
        found = [row.get(opset, {}) for opset in opsets]
        cells = [cell(each) for one in found for each in (one, one.get("openvino", {}))]
        steps = " ".join(sorted({f"`{one['steps']}`" for one in found if "steps" in one}))
        lines.append(f"| {name} | {row['class']} | {row.get('blocks', '-')} | " + " | ".join(cells) + f" | {steps} |")
    return "\n".join(lines)


def main() -> None:
    """Export what is asked for."""
    parser = zoo_runs.parser(__doc__)
    parser.add_argument("--opsets", type=int, nargs="+", default=[20, 23])
    parser.add_argument("--table", type=Path, help="print the table of a record that was written before, and run nothing")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return
    zoo_runs.run_each(args.names, functools.partial(run, args.opsets), args.out, {"onnxruntime": onnxruntime.__version__})


if __name__ == "__main__":
    main()
