"""The zoo as bundles of torch's own files: exported programs run bit for bit as the model does, and each weight is stored once.

    python benchmarks/export_torch.py --out benchmarks/results/export_torch.json
    python benchmarks/export_torch.py wan flux --format aoti

`beyond weights` is the bundle's size less that of the parameters and buffers that the graphs read, in bytes.
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

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import bwcache_compile as bw
from benchmarks.record import write_record
from bwcache_compile.compare import flat_outputs
from tests.zoo import ZOO

STEPS = 8


def compare(name: str, cached: bw.CachedModel, session: Any) -> tuple[str, float]:
    """Run both over all steps; return the decisions and the largest error, relative to the largest value of an output.

    Raises:
        ValueError: The decisions differ.
    """
    worst = 0.0
    for step in range(STEPS):
        inputs = ZOO[name].inputs(step)
        with torch.no_grad():
            expected = [value for value in flat_outputs(cached(**inputs)) if isinstance(value, torch.Tensor)]
        returned = session(**inputs)
        returned = list(returned.values()) if isinstance(returned, dict) else flat_outputs(returned)
        for want, got in zip(expected, [value for value in returned if value is not None], strict=True):
            if not torch.equal(want, got):
                worst = max(worst, float((got.double() - want.double()).abs().max() / want.double().abs().max()))
    patterns = ["".join("#" if r.computed else "." for r in run.report().contexts["default"].steps) for run in (session, cached)]
    if patterns[0] != patterns[1]:
        raise ValueError(f"decisions differ: {patterns[0]} instead of {patterns[1]}")
    return patterns[0], worst


def run(name: str, form: str) -> dict[str, Any]:
    """Export one class, and run what came out."""
    entry = ZOO[name]
    config = bw.CacheConfig(num_steps=STEPS, threshold=math.inf, reuse_interval=2)
    cached = bw.transform(entry.make(), config, example_kwargs=entry.call(0))
    row: dict[str, Any] = {"class": entry.model, "blocks": len(cached.plan.blocks)}
    with tempfile.TemporaryDirectory() as folder:
        try:
            began = time.perf_counter()
            manifest = bw.export(cached, Path(folder) / name, format=form)
            row["seconds"] = round(time.perf_counter() - began, 1)
            row["steps"], row["error"] = compare(name, cached, bw.load(Path(folder) / name, backend="torch", allow_code=True))
        except (bw.ExportError, bw.BundleError, bw.StateError, ValueError) as error:
            return {**row, "refused": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    size = sum(file["bytes"] for file in manifest["files"].values())
    tensors = manifest["weights"]["tensors"].values()
    weights = sum(math.prod(entry["shape"]) * getattr(torch, entry["dtype"]).itemsize for entry in tensors)
    return {**row, "bytes": size, "beyond weights": size - weights}


def main() -> None:
    """Export what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(ZOO))
    parser.add_argument("--format", choices=("pt2", "aoti"), default="pt2")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = {}
    for name in args.names:
        try:
            rows[name] = run(name, args.format)
        except ModuleNotFoundError as error:
            rows[name] = {"class": ZOO[name].model, "skipped": f"needs {error.name}"}
        print(name, json.dumps(rows[name]), flush=True)
        if args.out:
            write_record(args.out, {"torch": torch.__version__.partition("+")[0], "format": args.format, "rows": rows})


if __name__ == "__main__":
    main()
