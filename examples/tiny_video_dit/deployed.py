"""Generate clips from an exported bundle: what runs where there is no torch. Needs numpy, onnxruntime, pillow and tqdm.

The folder holds `bundle/` and `inputs.npz` (`noise`, float32[B, 3, F, H, W]; `tokens`, the condition; `steps`). Writes `clips.npy`,
`deployed.gif` and `deployed.json` beside them. The sampler is that of `model.py`, in numpy.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

import bwcache_compile as bw

GUIDANCE, SHIFT = np.float32(2.5), 2.0


def with_coordinates(clips: np.ndarray) -> np.ndarray:
    """Append channels that run from -1 to 1 along time, height and width: float32[B, 6, F, H, W]."""
    axes = [np.linspace(-1, 1, length, dtype=np.float32) for length in clips.shape[2:]]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"))
    return np.concatenate([clips, np.broadcast_to(grid, (len(clips), *grid.shape))], axis=1)


def sigmas(steps: int) -> np.ndarray:
    """Return the noise levels of a flow-matching Euler scheduler (diffusers' shifts twice), and zero: float32[steps + 1]."""

    def shifted(values: Any) -> Any:
        return SHIFT * values / (1 + (SHIFT - 1) * values)

    return np.append(shifted(np.linspace(1, shifted(0.001), steps)), 0).astype(np.float32)


def sample(session: Any, tokens: np.ndarray, noise: np.ndarray, steps: int) -> np.ndarray:
    """Generate clips with Euler steps and classifier-free guidance; two calls a step, each with a cache of its own."""
    latents, levels = noise, sigmas(steps)
    for now, following in zip(tqdm(levels[:-1], desc="without torch", unit="step"), levels[1:], strict=True):
        time, noisy = np.full(len(latents), 1000 * now, dtype=np.float32), with_coordinates(latents)
        with session.cache_context("cond"):
            conditioned = session(noisy, time, tokens, return_dict=False)[0]
        with session.cache_context("uncond"):
            free = session(noisy, time, np.zeros_like(tokens), return_dict=False)[0]
        clean = free + GUIDANCE * (conditioned - free)
        latents = latents + (following - now) * (latents - clean) / now
    return latents.clip(-1, 1)


def write_gif(clips: np.ndarray, path: Path, scale: int = 4) -> None:
    """Write the clips side by side, playing forth and back."""
    rows = np.concatenate(list(((clips + 1) * 127.5).round().astype(np.uint8)), axis=-1).transpose(1, 2, 3, 0)
    frames = [Image.fromarray(row.repeat(scale, 0).repeat(scale, 1)) for row in rows]
    frames += frames[-2:0:-1]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=120, loop=0)


def main() -> None:
    """Open the bundle, generate, write."""
    folder = Path(sys.argv[1])
    given = np.load(folder / "inputs.npz")
    session = bw.load(folder / "bundle")
    clips = sample(session, given["tokens"], given["noise"], int(given["steps"]))
    np.save(folder / "clips.npy", clips)
    write_gif(clips, folder / "deployed.gif")
    found = [name for name in ("torch", "diffusers", "onnx") if importlib.util.find_spec(name) is not None]
    (folder / "deployed.json").write_text(json.dumps({"report": str(session.report()), "importable": found}) + "\n")


if __name__ == "__main__":
    main()
