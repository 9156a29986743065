"""Serve the bundled video model behind Ray Serve, on one machine or a cluster: streamed progress, a tier of quality for each request.

    pip install "ray[serve]"
    python examples/serve.py --bundle out/serve     # exports the model there first, if need be; --torch runs it in torch instead

A request is JSON: `seed` of the noise, `tokens` of the prompt (`data.encode`, nested lists), `steps`, and `tier`, one of
`TIERS`. The answer is a line of JSON for each step, then one with the clip. A stream without that last line is no answer: a replica
died, and the request can be sent again, since it holds everything that its clip depends on. `ask` does so.

What a request caches is its own. In a bundle's session its contexts are a group that ends with the request, however it ends; in torch it
is a state that the request's own loop passes on. No other request can name it.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import itertools
import json
import sys
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

sys.path.insert(0, str(Path(__file__).parent / "tiny_video_dit"))

import deployed

import bwcache_compile as bw

TIERS: dict[str, dict[str, Any]] = {"exact": {"threshold": 0.0}, "high": {"threshold": 0.04}, "fast": {"threshold": 0.15}}
"""Settings of each tier. They are inputs of the graphs, so no tier has graphs of its own."""

MOST_STEPS = 100
AT_ONCE = 16
"""Requests that a replica runs at a time: two contexts each, of the 64 that a session keeps."""

SHAPE = (1, 3, 8, 32, 32)
"""Clips, channels, frames, height, width."""

ON_EACH_MACHINE = {"working_dir": str(Path(deployed.__file__).parent)}
"""What Ray copies to every machine beside this file; `bwcache-compile` is installed there."""

Denoise = Callable[[str, int, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Runs the model in a context, at a step, on noisy clips, their times and their tokens."""


def transformed() -> tuple[Any, tuple[Any, ...]]:
    """Return the model, cached, and an example of its inputs. Needs torch."""
    import data
    import model as tiny
    import torch

    tokens = data.encode(data.draw_attributes(1, torch.Generator().manual_seed(0)))
    example = (tiny.with_coordinates(torch.zeros(SHAPE)), torch.ones(1), tokens)
    settings = {"policy": "adaptive", "threshold": 0.1, "reuse": "taylor", "num_steps": MOST_STEPS}
    return bw.transform(tiny.load(), settings, example_args=example, example_kwargs={"return_dict": False}), example


class BundleModel:
    """The model from a bundle. Tiers are sessions over the same graphs and weights."""

    def __init__(self, bundle: str) -> None:
        """Open the bundle."""
        session = bw.load(bundle)
        self._sessions = {tier: session.with_settings(**settings) for tier, settings in TIERS.items()}

    def denoiser(self, tier: str, steps: int, request: str) -> tuple[Denoise, Callable[[], None]]:
        """Return what runs the steps of a request, and what frees its cache."""
        session, used = self._sessions[tier], set[str]()

        def denoise(context: str, step: int, noisy: np.ndarray, time: np.ndarray, tokens: np.ndarray) -> np.ndarray:
            with session.cache_context(context, group=request, step_index=step, num_inference_steps=steps):
                clean: np.ndarray = session(noisy, time, tokens, return_dict=False)[0]
            used.add(context)
            return clean

        def free() -> None:
            for context in used:
                session.drop_context(context, group=request)

        return denoise, free


class TorchModel:
    """The model in torch. What a request caches is a value that its steps pass on."""

    def __init__(self) -> None:
        """Load and capture the model."""
        self._cached, _ = transformed()

    def denoiser(self, tier: str, steps: int, request: str) -> tuple[Denoise, Callable[[], None]]:
        """Return what runs the steps of a request, and what frees its cache."""
        import torch

        states: dict[str, Any] = {}
        parameters = self._cached.policy_parameters(num_steps=steps, **TIERS[tier])

        def denoise(context: str, step: int, noisy: np.ndarray, time: np.ndarray, tokens: np.ndarray) -> np.ndarray:
            args, named = tuple(map(torch.from_numpy, (noisy, time, tokens))), {"return_dict": False}
            state = states[context] if step else self._cached.init_state(args, named)
            (clean,), states[context] = self._cached.functional_step(args, named, state, parameters)
            return np.asarray(clean)

        return denoise, states.clear


def sample(denoise: Denoise, seed: int, tokens: np.ndarray, steps: int) -> Iterator[np.ndarray]:
    """Yield the latents after each step, float32 of `SHAPE`: Euler with guidance, as `deployed.sample`."""
    latents = np.random.default_rng(seed).standard_normal(SHAPE, dtype=np.float32)
    levels = deployed.sigmas(steps)
    for step, (now, following) in enumerate(itertools.pairwise(levels)):
        time, noisy = np.full(len(latents), 1000 * now, dtype=np.float32), deployed.with_coordinates(latents)
        conditioned = denoise("cond", step, noisy, time, tokens)
        free = denoise("uncond", step, noisy, time, np.zeros_like(tokens))
        latents = latents + (following - now) * (latents - (free + deployed.GUIDANCE * (conditioned - free))) / now
        yield latents


def wrong_with(given: Any) -> str:
    """Say what is wrong with a request; empty if nothing is."""
    if not isinstance(given, dict) or set(given) != {"seed", "tokens", "steps", "tier"}:
        return "a request is an object with seed, tokens, steps and tier"
    if given["tier"] not in TIERS:
        return f"tier must be one of {', '.join(TIERS)}"
    if not isinstance(given["steps"], int) or not 2 <= given["steps"] <= MOST_STEPS:
        return f"steps must be from 2 to {MOST_STEPS}"
    if not isinstance(given["seed"], int) or given["seed"] < 0:
        return "seed must be a whole number, 0 or more"
    return ""


@serve.deployment(max_ongoing_requests=AT_ONCE)
class Generator:
    """Generates clips. A replica has the model once, for all of its requests."""

    def __init__(self, bundle: str | None) -> None:
        """Open a bundle, or without one the model in torch."""
        self._model = BundleModel(bundle) if bundle else TorchModel()

    async def __call__(self, request: Request) -> Response:
        """Answer with a stream of steps and the clip, or with what is wrong with the request."""
        try:
            given = json.loads(await request.body())
        except json.JSONDecodeError:
            given = None
        if wrong := wrong_with(given):
            return JSONResponse({"error": wrong}, status_code=400)
        return StreamingResponse(self._lines(given), media_type="application/x-ndjson")

    async def _lines(self, given: dict[str, Any]) -> AsyncIterator[str]:
        """Yield a line for each step, then the clip; frees the request's cache when the stream ends, or the client goes away."""
        denoise, free = self._model.denoiser(given["tier"], given["steps"], uuid.uuid4().hex)
        steps = sample(denoise, given["seed"], np.asarray(given["tokens"], dtype=np.float32), given["steps"])
        running = threading.Lock()

        def advance() -> np.ndarray:
            with running:
                return next(steps)

        def close() -> None:
            with running:  # a client that goes away leaves a step behind that still runs
                free()

        try:
            for step in range(given["steps"]):
                latents = await asyncio.to_thread(advance)
                yield json.dumps({"step": step}) + "\n"
            clip = np.ascontiguousarray(latents.clip(-1, 1))
            yield json.dumps({"shape": clip.shape, "clip": base64.b64encode(clip.tobytes()).decode()}) + "\n"
        finally:
            asyncio.get_running_loop().run_in_executor(None, close)


def ask(url: str, request: dict[str, Any], attempts: int = 3, on_step: Callable[[int], None] = lambda step: None) -> np.ndarray:
    """Send a request and return its clip; a stream that breaks off is asked for again from its beginning.

    Raises:
        ValueError: The request is wrong.
        ConnectionError: Every attempt broke off.
    """
    body = json.dumps(request).encode()
    for _ in range(attempts):
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data=body), timeout=600) as stream:
                for line in map(json.loads, stream):
                    if "clip" in line:
                        return np.frombuffer(base64.b64decode(line["clip"]), dtype=np.float32).reshape(line["shape"])
                    on_step(line["step"])
        except urllib.error.HTTPError as error:
            if error.code == 400:
                raise ValueError(json.load(error)["error"]) from error
        except (OSError, HTTPException, json.JSONDecodeError):
            pass  # the stream broke off
    raise ConnectionError(f"{attempts} attempts ended without a clip.")


def export(bundle: Path) -> None:
    """Write the bundle if it is not there."""
    if not bundle.exists():
        cached, _ = transformed()
        bw.export(cached, bundle)


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=Path("out/serve"))
    parser.add_argument("--torch", action="store_true", help="run the model in torch instead of a bundle")
    parser.add_argument("--replicas", type=int, default=2)
    args = parser.parse_args()
    if not args.torch:
        export(args.bundle)
    bundle = None if args.torch else str(args.bundle.resolve())
    ray.init(runtime_env=ON_EACH_MACHINE)
    serve.run(Generator.options(num_replicas=args.replicas).bind(bundle), blocking=True)


if __name__ == "__main__":
    main()
