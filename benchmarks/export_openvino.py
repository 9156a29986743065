"""What a bundle costs in OpenVINO, beside ONNX Runtime and beside the schedule of OpenVINO GenAI's TaylorSeer Lite. Ratios within one run.

    python benchmarks/export_openvino.py --out benchmarks/results/export_openvino.json

The contestants take turns, call by call, and medians are compared: the model without a cache, the same model without blocks
(prologue and epilogue alone), and a session's computed and reused steps, cached at the blocks and at the model's output; all of
it in both engines, in float32. TaylorSeer Lite extrapolates the model's output to first order on a comb of steps. The same mask
and the same rule are settings here, so the run over all its steps is compared with the least that it can take: its computed
steps, each as long as the plain model's in that engine.
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import openvino
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import bwcache_compile as bw
from benchmarks.export import bundle_session, options, plain_session, write_models
from benchmarks.record import write_record
from benchmarks.steps import inputs, take_turns, wan

STEPS, INTERVAL, FIRST, LAST = 50, 3, 6, 2
"""A generation; on its comb a step in INTERVAL computes, and so do its first and last steps: TaylorSeer Lite's defaults there."""
MASK = tuple(int(FIRST <= step < STEPS - LAST and (step - FIRST) % INTERVAL != INTERVAL - 1) for step in range(STEPS))
LAYERS = 8
ENGINES = ("onnxruntime", "openvino")


def settings(engine: str, threads: int) -> Any:
    """Return the options of an engine: the same number of threads, and float32."""
    return options(threads) if engine == "onnxruntime" else {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}


def plain_call(engine: str, path: Path, threads: int, feeds: dict[str, Any]) -> Callable[[], Any]:
    """Open a model that has no cache in an engine; return a call of it."""
    if engine == "onnxruntime":
        return plain_session(path, threads, feeds)
    compiled = openvino.Core().compile_model(str(path), "CPU", settings(engine, threads))
    request = compiled.create_infer_request()
    taken = {port.any_name: feeds[port.any_name] for port in compiled.inputs}
    return lambda: request.infer(taken, share_inputs=True)


def write_output_bundle(folder: Path) -> None:
    """Export the model of `write_models` cached at its output, with the comb as its mask and first-order extrapolation."""
    torch.manual_seed(0)
    config = bw.CacheConfig(policy="static", steps_mask=MASK, cut="output", reuse="taylor")
    call = inputs()
    bw.export(bw.transform(wan(LAYERS), config, example_kwargs=call), folder)


def generate(session: bw.Session, feeds: dict[str, Any]) -> float:
    """Run a generation on the comb; return its seconds."""
    session.reset()
    began = time.perf_counter()
    for step in range(STEPS):
        session(**{**feeds, "timestep": np.array([1000.0 - 1000 * step / STEPS], np.float32)})
    seconds = time.perf_counter() - began
    ran = tuple(int(not record.computed) for record in session.report().contexts["default"].steps)
    assert ran == MASK, ran
    return seconds


def measure(rounds: int, generations: int, threads: int) -> dict[str, Any]:
    """Write the models, let both engines take turns, and compare a generation with its computed steps alone."""
    calls: dict[str, Callable[[], Any]] = {}
    sessions: dict[str, bw.Session] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_models(place, LAYERS, 20)
        write_output_bundle(place / "output")
        feeds = dict(np.load(place / "inputs.npz"))
        for engine in ENGINES:
            for name in ("plain", "shell"):
                calls[f"{engine} {name}"] = plain_call(engine, place / f"{name}.onnx", threads, feeds)
            session = bw.load(place / "bundle", backend=engine, options=settings(engine, threads))
            calls[f"{engine} computed"], calls[f"{engine} reused"] = bundle_session(session, feeds)
            sessions[engine] = bw.load(place / "output", backend=engine, options=settings(engine, threads))
        for call in calls.values():
            call()
        slow = take_turns({name: call for name, call in calls.items() if name.endswith(("plain", "computed"))}, rounds)
        fast = take_turns({name: call for name, call in calls.items() if name.endswith(("shell", "reused"))}, 20 * rounds)
        runs = [{engine: generate(sessions[engine], feeds) for engine in ENGINES} for _ in range(generations)]
    seconds = slow | fast
    return {
        engine: {
            "ms": {name.partition(" ")[2]: 1e3 * value for name, value in seconds.items() if name.startswith(f"{engine} ")},
            "plain_over_onnxruntime": seconds[f"{engine} plain"] / seconds["onnxruntime plain"],
            "computed_over_plain": seconds[f"{engine} computed"] / seconds[f"{engine} plain"],
            "reused_over_shell": seconds[f"{engine} reused"] / seconds[f"{engine} shell"],
            "reused_over_plain": seconds[f"{engine} reused"] / seconds[f"{engine} plain"],
            "comb_over_its_computed_steps": statistics.median(run[engine] for run in runs) / (MASK.count(0) * seconds[f"{engine} plain"]),
            "comb_over_all_steps": statistics.median(run[engine] for run in runs) / (STEPS * seconds[f"{engine} plain"]),
        }
        for engine in ENGINES
    }


ROWS = {
    "plain model, against ONNX Runtime's": "plain_over_onnxruntime",
    "a computed step against the plain model": "computed_over_plain",
    "a reused step against prologue and epilogue alone": "reused_over_shell",
    "a reused step against the plain model": "reused_over_plain",
    "TaylorSeer Lite's comb against its computed steps alone": "comb_over_its_computed_steps",
    "TaylorSeer Lite's comb against all steps": "comb_over_all_steps",
}


def main() -> None:
    """Measure, print a table, write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--generations", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of either engine (default %(default)s)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    found = measure(args.rounds, args.generations, args.threads)
    print(f"| ratio | {' | '.join(ENGINES)} |\n|---{'|---' * len(ENGINES)}|")
    for text, key in ROWS.items():
        print(f"| {text} | {' | '.join(f'{found[engine][key]:.3g}' for engine in ENGINES)} |")
    if args.out:
        versions = {"torch": torch.__version__, "onnxruntime": ort.__version__, "openvino": openvino.__version__}
        about = {
            "class": "WanTransformer3DModel",
            "layers": LAYERS,
            "tokens": 1024,
            "width": 512,
            "steps": STEPS,
            "computed": MASK.count(0),
        }
        write_record(
            args.out, {"versions": versions, "python": platform.python_version(), "threads": args.threads, "model": about, **found}
        )


if __name__ == "__main__":
    main()
