"""Fifty requests at once against `examples/serve.py`, and a replica that is killed midway: is every clip right, and how long did each take?

    pip install "ray[serve]"
    python benchmarks/serve.py --out benchmarks/results/serve.json

Every clip is compared with the same request run directly, in this process, one after the other. One client in ten goes away after
two steps.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import serve as ray_serve

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "tiny_video_dit"))

import data
import serve
import torch

from benchmarks.record import write_record

URL = "http://127.0.0.1:8000/"


def requests(count: int, steps: int) -> list[dict[str, Any]]:
    """Return requests of all tiers, no two alike."""
    tokens = data.encode(data.draw_attributes(count, torch.Generator().manual_seed(1)))
    tiers = list(serve.TIERS)
    return [{"seed": i, "tokens": tokens[i : i + 1].tolist(), "steps": steps, "tier": tiers[i % len(tiers)]} for i in range(count)]


def direct(model: Any, request: dict[str, Any]) -> np.ndarray:
    """Run one request by itself."""
    denoise, free = model.denoiser(request["tier"], request["steps"], "direct")
    *_, latents = serve.sample(denoise, request["seed"], np.asarray(request["tokens"], dtype=np.float32), request["steps"])
    free()
    return latents.clip(-1, 1)


def go_away(request: dict[str, Any]) -> None:
    """Send a request and close the connection after two steps."""
    body = json.dumps(request).encode()
    with urllib.request.urlopen(urllib.request.Request(URL, data=body), timeout=600) as stream:
        stream.readline()
        stream.readline()


def kill_one_replica() -> None:
    """Kill a replica, as a crash would."""
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if "Generator" in actor["name"]]
    ray.kill(ray.get_actor(names[0], namespace="serve"), no_restart=True)


def run(bundle: str | None, count: int, steps: int) -> dict[str, Any]:
    """Serve, ask, kill, compare."""
    model = serve.BundleModel(bundle) if bundle else serve.TorchModel()
    asked = requests(count, steps)
    expected = [direct(model, request) for request in asked]
    ray_serve.run(serve.Generator.options(num_replicas=2).bind(bundle))
    serve.ask(URL, asked[0])  # both replicas are up
    seconds, begun, killed = [0.0] * count, threading.Semaphore(0), 0.0
    start = time.perf_counter()

    def answer(place: int) -> np.ndarray | None:
        if place % 10 == 9:
            go_away(asked[place])
            return None
        clip = serve.ask(URL, asked[place], attempts=5, on_step=lambda step: begun.release())
        seconds[place] = time.perf_counter() - start
        return clip

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(answer, place) for place in range(count)]
        for _ in range(count * steps // 4):  # a quarter of all steps
            begun.acquire()
        kill_one_replica()
        killed = time.perf_counter() - start
        clips = [future.result() for future in futures]
    errors = [float(np.abs(clip - want).max()) for clip, want in zip(clips, expected, strict=True) if clip is not None]
    waited = sorted(second for second in seconds if second)
    ray_serve.shutdown()
    return {
        "model": "bundle" if bundle else "torch",
        "requests": count,
        "steps": steps,
        "answered": len(errors),
        "went away": count - len(errors),
        "wrong": sum(error > 0 for error in errors),
        "largest error": max(errors),
        "replica killed after s": round(killed, 2),
        "latency s": {
            "median": round(statistics.median(waited), 2),
            "p90": round(waited[int(0.9 * (len(waited) - 1))], 2),
            "largest": round(waited[-1], 2),
        },
    }


def main() -> None:
    """Run the bundle and torch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env=serve.ON_EACH_MACHINE)
    ray.cloudpickle.register_pickle_by_value(serve)  # an example is no package that the workers could import
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        serve.export(bundle)
        runs = [run(given, args.requests, args.steps) for given in (str(bundle), None)]
    record = {"command": "python benchmarks/serve.py", "ray": ray.__version__, "torch": torch.__version__, "runs": runs}
    print(json.dumps(record, indent=2))
    if args.out is not None:
        write_record(args.out, record)


if __name__ == "__main__":
    main()
