"""What a bundle costs in ONNX Runtime on a CPU against the model exported as it is. Ratios within one run.

    python benchmarks/export.py --out benchmarks/results/export_cpu.json

The contestants take turns, call by call, and medians are compared: the model without a cache, exported by `torch.onnx`;
the same model without blocks, which is prologue and epilogue alone; a session's computed and reused steps, with the pair of
graphs and with the guarded one. Each session is called as its users call it, with numpy arrays in and out. Memory is that of
processes of their own, after a generation, beyond what importing onnxruntime takes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import platform
import resource
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

sys.path.insert(0, str(Path(__file__).parents[1]))

import bwcache_compile as bw
from benchmarks.record import write_record

FOREVER = 10**6
"""Steps of a generation that no benchmark comes to the end of."""


def options(threads: int) -> ort.SessionOptions:
    """Return session options, the same for every contestant."""
    chosen = ort.SessionOptions()
    chosen.intra_op_num_threads = threads
    return chosen


def plain_session(path: Path, threads: int, feeds: dict[str, Any]) -> Callable[[], Any]:
    """Open a model that has no cache; return a call of it."""
    session = ort.InferenceSession(str(path), options(threads), providers=["CPUExecutionProvider"])
    taken = {value.name: feeds[value.name] for value in session.get_inputs()}
    return lambda: session.run(None, taken)


def bundle_session(session: bw.Session, feeds: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return a call of a session that always computes and one that always reuses, each in a context of its own."""
    steps = {"reusing": itertools.count(), "computing": itertools.count()}  # the inputs do not move, so they tell no steps apart

    def call(context: str) -> Any:
        with session.cache_context(context, step_index=next(steps[context])):
            return session(**feeds)

    session.configure(threshold=math.inf, reuse_interval=FOREVER, num_steps=FOREVER)
    for _ in range(3):
        call("reusing")
    session.configure(threshold=0.0)
    call("computing")
    assert [step.computed for step in session.report().contexts["reusing"].steps] == [True, True, False]
    return lambda: call("computing"), lambda: call("reusing")


def resident() -> int:
    """Return the bytes of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def memory(kind: str, place: Path, threads: int) -> None:
    """Print, as JSON, the memory that a session holds after a generation (in a process of its own)."""
    before, feeds = resident(), dict(np.load(place / "inputs.npz"))
    if kind == "plain":
        calls: Sequence[Callable[[], Any]] = (plain_session(place / "plain.onnx", threads, feeds),)
    else:
        calls = bundle_session(bw.load(place / "bundle", guarded=kind == "guarded", options=options(threads)), feeds)
    for call in 3 * tuple(calls):
        call()
    print(json.dumps(resident() - before))


def write_models(place: Path, layers: int, opset: int) -> dict[str, Any]:
    """Write the bundle, the model without a cache and the one without blocks; return their sizes in bytes."""
    import torch

    from benchmarks.steps import inputs, wan

    torch.manual_seed(0)
    call = inputs()
    model, taken = wan(layers), {name: value for name, value in call.items() if isinstance(value, torch.Tensor)}
    np.savez(place / "inputs.npz", **{name: value.numpy() for name, value in taken.items()})
    for name, plain in (("plain", model), ("shell", wan(0))):
        program = torch.onnx.export(plain, (), kwargs=call, dynamo=True, opset_version=opset, verbose=False)
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # stack traces, which ours have not either
        program.save(place / f"{name}.onnx", external_data=True)
    manifest = bw.export(bw.transform(model, bw.CacheConfig(num_steps=8), example_kwargs=call), place / "bundle", guarded=True, opset=opset)
    files = {path.name: path.stat().st_size for path in (place / "bundle").iterdir()}
    return {
        "plain": sum(path.stat().st_size for path in place.glob("plain.onnx*")),
        "pair": sum(files.values()) - files[manifest.graphs["guarded"].file],
        "with_guarded": sum(files.values()),
    }


def measure(layers: int, opset: int, rounds: int, threads: int) -> dict[str, Any]:
    """Write the models, let the sessions take turns, and weigh them."""
    from benchmarks.steps import take_turns

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        sizes = write_models(place, layers, opset)
        feeds = dict(np.load(place / "inputs.npz"))
        plain, shell = (plain_session(place / f"{name}.onnx", threads, feeds) for name in ("plain", "shell"))
        sessions = [bw.load(place / "bundle", guarded=guarded, options=options(threads)) for guarded in (False, True)]
        (computed, reused), (guarded_computed, guarded_reused) = (bundle_session(session, feeds) for session in sessions)
        slow = take_turns({"plain": plain, "computed": computed, "guarded_computed": guarded_computed}, rounds)
        fast = take_turns({"shell": shell, "reused": reused, "guarded_reused": guarded_reused}, 20 * rounds)
        held = {}
        for kind in ("plain", "pair", "guarded"):
            command = [sys.executable, __file__, "--memory", kind, folder, "--threads", str(threads)]
            held[kind] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {
        "opset": opset,
        "ms": {name: 1e3 * seconds for name, seconds in (slow | fast).items()},
        "computed_over_plain": slow["computed"] / slow["plain"],
        "guarded_computed_over_plain": slow["guarded_computed"] / slow["plain"],
        "reused_over_shell": fast["reused"] / fast["shell"],
        "guarded_reused_over_shell": fast["guarded_reused"] / fast["shell"],
        "reused_over_plain": fast["reused"] / slow["plain"],
        "bytes": sizes,
        "pair_over_plain_bytes": sizes["pair"] / sizes["plain"],
        "with_guarded_over_plain_bytes": sizes["with_guarded"] / sizes["plain"],
        "memory": held,
        "pair_over_plain_memory": held["pair"] / held["plain"],
        "guarded_over_plain_memory": held["guarded"] / held["plain"],
    }


ROWS = {
    "a computed step against the plain model": ("computed_over_plain", "1.03"),
    "a reused step against prologue and epilogue alone": ("reused_over_shell", "1.1"),
    "a reused step against the plain model": ("reused_over_plain", ""),
    "guarded: a computed step against the plain model": ("guarded_computed_over_plain", ""),
    "guarded: a reused step against prologue and epilogue alone": ("guarded_reused_over_shell", ""),
    "bundle against the plain file": ("pair_over_plain_bytes", "1.05"),
    "bundle with the guarded graph against the plain file": ("with_guarded_over_plain_bytes", ""),
    "memory of a session against the plain model's": ("pair_over_plain_memory", ""),
    "guarded: memory of a session against the plain model's": ("guarded_over_plain_memory", ""),
}


def main() -> None:
    """Measure, print a table, write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="onnxruntime's threads (default %(default)s)")
    parser.add_argument("--opsets", type=int, nargs="+", default=[20, 23])
    parser.add_argument("--memory", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        memory(args.memory[0], Path(args.memory[1]), args.threads)
        return
    warnings.simplefilter("ignore")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    found = [measure(args.layers, opset, args.rounds, args.threads) for opset in args.opsets]
    columns = " | ".join(f"opset {row['opset']}" for row in found)
    print(f"| ratio | {columns} | goal |\n|---|{'---|' * len(found)}---|")
    for text, (key, goal) in ROWS.items():
        print(f"| {text} | {' | '.join(f'{row[key]:.3g}' for row in found)} | {goal} |")
    if args.out:
        import torch

        versions = {"torch": torch.__version__, "onnxruntime": ort.__version__, "python": platform.python_version()}
        model = {"class": "WanTransformer3DModel", "layers": args.layers, "tokens": 1024, "width": 512}
        write_record(args.out, {"versions": versions, "threads": args.threads, "model": model, "rows": found})


if __name__ == "__main__":
    main()
