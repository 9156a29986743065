"""The zoo as bundles of torch's own files: exported programs run bit for bit as the model does, and each weight is stored once.

    python benchmarks/export_torch.py --out benchmarks/results/export_torch.json
    python benchmarks/export_torch.py wan flux --format aoti

`beyond weights` is the bundle's size less that of the parameters and buffers that the graphs read, in bytes.
"""

from __future__ import annotations

import functools
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import bwcache_compile as bw
from benchmarks import zoo_runs
from tests.zoo import ZOO


def unchanged(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return a step's inputs as they are."""
    return inputs


def run(form: str, name: str) -> dict[str, Any]:
    """Export one class, and run what came out."""
    entry = ZOO[name]
    cached, row = zoo_runs.transformed(entry)
    with tempfile.TemporaryDirectory() as folder:
        try:
            began = time.perf_counter()
            manifest = bw.export(cached, Path(folder) / name, format=form)
            row["seconds"] = round(time.perf_counter() - began, 1)
            session = bw.load(Path(folder) / name, backend="torch", allow_code=True)
            row["steps"], row["error"] = zoo_runs.compare(entry, cached, session, unchanged)
        except (bw.ExportError, bw.BundleError, bw.StateError, ValueError) as error:
            return {**row, **zoo_runs.refused(error)}
    size = sum(file.bytes for file in manifest.files.values())
    tensors = manifest.weights.tensors.values()
    weights = sum(math.prod(entry.shape) * getattr(torch, entry.dtype).itemsize for entry in tensors)
    return {**row, "bytes": size, "beyond weights": size - weights}


def main() -> None:
    """Export what is asked for."""
    parser = zoo_runs.parser(__doc__)
    parser.add_argument("--format", choices=("pt2", "aoti"), default="pt2")
    args = parser.parse_args()
    zoo_runs.run_each(args.names, functools.partial(run, args.format), args.out, {"format": args.format})


if __name__ == "__main__":
    main()
