"""The zoo as bundles of torch's own files: exported programs run bit for bit as the model does, and each weight is stored once.

    python benchmarks/export_torch.py --out benchmarks/results/export_torch.json
    python benchmarks/export_torch.py wan flux --format aoti

`beyond weights` is the bundle's size less that of the parameters and buffers that the graphs read, in bytes.

    python benchmarks/export_torch.py --depths 4 12 30 --tokens 1024 --out benchmarks/results/export_blocks.json

exports Wan models of these depths, 256 wide, with AOTInductor instead: as one package, and with `blocks_once=True`. Each is exported in a
process of its own with empty caches, whose processor seconds and those of the C++ compiler are reported, from the call of `export` to its
end, its check included; then both run computed steps in one process, taking turns, and medians are reported.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import bwcache_compile as bw
from benchmarks import zoo_runs
from benchmarks.record import write_record
from benchmarks.steps import inputs, take_turns, wan
from benchmarks.zoo_runs import STEPS
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


def _processor_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in used)


def _inputs(tokens: int) -> dict[str, Any]:
    return inputs(4, 16, tokens // 16)


def export_alone(depth: int, tokens: int, folder: Path, blocks_once: bool) -> None:
    """Export one form and print its cost; for a process of its own."""
    cached = bw.transform(wan(depth, width=256), bw.CacheConfig(num_steps=STEPS), example_kwargs=_inputs(tokens))
    before = _processor_seconds()
    bw.export(cached, folder, format="aoti", blocks_once=blocks_once)
    print(_processor_seconds() - before)


def compare_blocks(depth: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Export both forms and run them side by side."""
    row: dict[str, Any] = {"depth": depth, "tokens": tokens}
    sessions = {}
    with tempfile.TemporaryDirectory() as place:
        for form, blocks_once in (("one package", False), ("blocks once", True)):
            folder = Path(place) / form.replace(" ", "_")
            caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}_caches"}
            words = [sys.executable, __file__, "--alone", str(depth), str(tokens), str(folder), *(["--blocks-once"] if blocks_once else [])]
            done = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, **caches})
            session = sessions[form] = bw.load(folder, allow_code=True)
            files = {name: file.bytes for name, file in session.manifest.files.items() if name.endswith(".pt2")}
            row[form] = {
                "processor seconds": round(float(done.stdout.split()[-1]), 1),
                "bytes": sum(files.values()),
                "packages": len(files),
            }
        call = _inputs(tokens)

        def step(session: Any) -> None:
            with session.cache_context("timed", step_index=0):  # the first step of a generation, which is computed
                session(**call)

        for form, seconds in take_turns({form: functools.partial(step, session) for form, session in sessions.items()}, rounds).items():
            row[form]["computed step, ms"] = round(1e3 * seconds, 3)
    return row


def main() -> None:
    """Export what is asked for."""
    parser = zoo_runs.parser(__doc__)
    parser.add_argument("--format", choices=("pt2", "aoti"), default="pt2")
    parser.add_argument("--depths", nargs="+", type=int, help="compare both forms of compiled bundles on Wan models of these depths")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--blocks-once", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        depth, tokens, folder = args.alone
        export_alone(int(depth), int(tokens), Path(folder), args.blocks_once)
        return
    if args.depths:
        rows = []
        for depth in args.depths:
            rows.append(compare_blocks(depth, args.tokens, args.rounds))
            print(json.dumps(rows[-1]), flush=True)
            if args.out:
                write_record(args.out, {"torch": torch.__version__.partition("+")[0], "threads": torch.get_num_threads(), "rows": rows})
        return
    zoo_runs.run_each(args.names, functools.partial(run, args.format), args.out, {"format": args.format})


if __name__ == "__main__":
    main()
