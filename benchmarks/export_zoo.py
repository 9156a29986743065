"""Export the classes of the zoo and run each bundle beside torch.

`python benchmarks/export_zoo.py --out benchmarks/results/export_zoo.json`; takes about half an hour.

For every class, at each operator set: the pair and the guarded graph over 8 steps with both branches taken, on the
inputs that the zoo draws for each step. Decisions must equal torch's; the error is the largest difference of an output
relative to its largest value. What cannot be exported is listed with the reason, and so are the operators that
TensorRT's parser does not list.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import bwcache_compile as bw
from benchmarks.record import write_record
from bwcache_compile.compare import flat_outputs
from bwcache_compile.exporters.bundle import open_bundle
from bwcache_compile.exporters.tensorrt_operators import unlisted_operators
from tests.zoo import ZOO, Entry

STEPS = 8


def as_numpy(value: Any) -> Any:
    """Turn the tensors of an input into arrays, as a process without torch has them."""
    if isinstance(value, torch.Tensor):
        return value.numpy()
    if isinstance(value, dict):
        return {key: as_numpy(item) for key, item in value.items()}
    return type(value)(as_numpy(item) for item in value) if isinstance(value, (list, tuple)) else value


def flat(output: Any) -> list[Any]:
    """Return the arrays of a session's output."""
    return list(output.values()) if isinstance(output, dict) else list(output) if isinstance(output, tuple) else [output]


def compare(entry: Entry, cached: bw.CachedModel, session: Any) -> tuple[str, float]:
    """Run both over all steps; return the decisions and the largest error.

    Raises:
        ValueError: The decisions differ.
    """
    cached.reset()
    worst = 0.0
    for step in range(STEPS):
        with torch.no_grad():
            expected = [value for value in flat_outputs(cached(**entry.inputs(step))) if isinstance(value, torch.Tensor)]
        actual = [value for value in flat(session(**{k: as_numpy(v) for k, v in entry.inputs(step).items()})) if value is not None]
        for want, got in zip(expected, actual, strict=True):
            worst = max(worst, float(np.abs(got - want.numpy()).max() / want.abs().max()))
    ours, theirs = (["#" if r.computed else "." for r in run.report().contexts["default"].steps] for run in (session, cached))
    if ours != theirs:
        raise ValueError(f"decisions differ: {''.join(ours)} instead of {''.join(theirs)}")
    return "".join(ours), worst


def run(name: str, opsets: list[int]) -> dict[str, Any]:
    """Export one class at each operator set, and run what came out."""
    entry = ZOO[name]
    config = bw.CacheConfig(num_steps=STEPS, threshold=math.inf, reuse_interval=2)
    cached = bw.transform(entry.make(), config, example_kwargs=entry.call(0))
    row: dict[str, Any] = {"class": entry.model, "blocks": len(cached.plan.blocks)}
    for opset in opsets:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                manifest = bw.export(cached, Path(folder) / name, guarded=True, opset=opset)
                found = {
                    kind: compare(entry, cached, bw.load(Path(folder) / name, guarded=kind == "guarded")) for kind in ("pair", "guarded")
                }
                size = sum(file["bytes"] for file in manifest["files"].values())
                unlisted = sorted({f"{one.operator}: {one.reason}" for one in unlisted_operators(open_bundle(Path(folder) / name))})
            except (bw.ExportError, bw.BundleError, bw.StateError, ValueError) as error:
                row[f"opset {opset}"] = {"refused": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
                continue
        seconds = time.perf_counter() - began
        errors = {kind: error for kind, (_, error) in found.items()}
        row[f"opset {opset}"] = {"steps": found["pair"][0], "errors": errors, "seconds": round(seconds, 1), "bytes": size}
        row[f"opset {opset}"]["not listed by TensorRT"] = unlisted
    return row


def table(record: dict[str, Any]) -> str:
    """Return what a record says as a table: of each class and operator set the largest error, over both forms and all steps."""
    opsets = sorted({key for row in record["rows"].values() for key in row if key.startswith("opset")})
    lines = ["| configuration | class | blocks | " + " | ".join(opsets) + " | steps |", "|---" * (4 + len(opsets)) + "|"]
    for name, row in record["rows"].items():
        found = [row.get(opset, {}) for opset in opsets]
        cells = [f"{max(one['errors'].values()):.1e}" if "errors" in one else one.get("refused", "-") for one in found]
        steps = " ".join(sorted({f"`{one['steps']}`" for one in found if "steps" in one}))
        lines.append(f"| {name} | {row['class']} | {row.get('blocks', '-')} | " + " | ".join(cells) + f" | {steps} |")
    return "\n".join(lines)


def main() -> None:
    """Export what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(ZOO))
    parser.add_argument("--opsets", type=int, nargs="+", default=[20, 23])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="print the table of a record that was written before, and run nothing")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return
    warnings.simplefilter("ignore")
    rows = {}
    for name in args.names:
        try:
            rows[name] = run(name, args.opsets)
        except ModuleNotFoundError as error:
            rows[name] = {"class": ZOO[name].model, "skipped": f"needs {error.name}"}
        print(name, json.dumps(rows[name]), flush=True)
        if args.out:
            versions = {"torch": torch.__version__.partition("+")[0], "onnxruntime": onnxruntime.__version__}
            write_record(args.out, {**versions, "rows": rows})


if __name__ == "__main__":
    main()
