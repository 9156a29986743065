"""Export the classes of the zoo in half precision, and record what the exporter's own check found.

`python benchmarks/export_half.py --dtype bfloat16 --out benchmarks/results/export_bf16.json`; takes about a quarter of an hour.

Weights and inputs are cast as diffusers loads them: modules that a class wants in float32 stay so. At each operator set the pair and
the guarded graph run over 6 steps beside torch, both branches taken; float16 in ONNX Runtime's CPU provider as it is, bfloat16 by
graphs that compute in float32 between casts. A row that says why it was refused is a result too.
"""

from __future__ import annotations

import functools
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).parents[1]))

import bwcache_compile as bw
from benchmarks import zoo_runs
from benchmarks.half import halved
from tests.zoo import ZOO


def run(dtype: torch.dtype, opsets: list[int], name: str) -> dict[str, Any]:
    """Export one class in a dtype at each operator set."""
    entry = ZOO[name]
    row: dict[str, Any] = {"class": entry.model}
    inputs = pytree.tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.dtype == torch.float32 else t, entry.call(0))
    config = bw.CacheConfig(num_steps=zoo_runs.STEPS, threshold=math.inf, reuse_interval=2)
    try:
        model = halved(entry.make(), dtype)
        with torch.no_grad():
            model(**inputs)
    except RuntimeError as error:
        return {**row, "the model itself fails": str(error).splitlines()[0]}
    cached = bw.transform(model, config, example_kwargs=inputs)
    for opset in opsets:
        with tempfile.TemporaryDirectory() as folder:
            try:
                report = bw.export(cached, Path(folder) / name, guarded=True, opset=opset).self_check
            except bw.ExportError as error:
                row[f"opset {opset}"] = zoo_runs.refused(error)
                continue
        kept = ("runs", "steps", "tolerance", "largest_error")
        row[f"opset {opset}"] = {**{key: report[key] for key in kept}, "stand_in": "stand_in" in report}
    return row


def main() -> None:
    """Export what is asked for."""
    parser = zoo_runs.parser(__doc__)
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="bfloat16")
    parser.add_argument("--opsets", type=int, nargs="+", default=[20, 23])
    args = parser.parse_args()
    about = {"onnxruntime": onnxruntime.__version__, "dtype": args.dtype}
    zoo_runs.run_each(args.names, functools.partial(run, getattr(torch, args.dtype), args.opsets), args.out, about)


if __name__ == "__main__":
    main()
