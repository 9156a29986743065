"""Export the bundled video model and generate in a process where torch cannot be imported; the clips are the same.

Runs the model and its cached form in torch, writes the cached form as a bundle, and starts `tiny_video_dit/deployed.py` with a
Python that sees numpy, onnxruntime, pillow, tqdm and this package, nothing else. Prints how close the three videos are.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent / "tiny_video_dit"))

import data
import model as tiny
import quality

import bwcache_compile as bw

# With 50 steps the trigger falls on the first step past the warm-up for any clip, so that rounding errors decide nothing.
SETTINGS: dict[str, Any] = {"warmup_steps": 4, "reuse_interval": 3, "reuse": "taylor"}
SHIPPED = ("bwcache_compile", "numpy", "onnxruntime", "PIL", "tqdm")
"""What the deployed process can import beside the standard library."""


def run_without_torch(folder: Path) -> dict[str, Any]:
    """Run `deployed.py` on a folder in a Python that sees the packages in `SHIPPED` alone; return what it says of itself."""
    with tempfile.TemporaryDirectory() as packages:
        for name in SHIPPED:
            (Path(packages) / name).symlink_to(Path(str(importlib.import_module(name).__file__)).resolve().parent)
        script = Path(__file__).parent / "tiny_video_dit" / "deployed.py"
        # -S leaves out site-packages
        subprocess.run([sys.executable, "-S", str(script), str(folder)], check=True, env={**os.environ, "PYTHONPATH": packages})
    return json.loads((folder / "deployed.json").read_text())


def generate(model: Any, name: str, tokens: torch.Tensor, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """Generate in torch, with a progress bar."""
    with tqdm(total=steps, desc=name, unit="step") as bar:
        return tiny.sample(model, tokens, noise, steps, on_step=bar.update)


def main() -> None:
    """Export, deploy, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threshold", type=float, default=0.065, help="reuse begins below it; fewer steps need more (default %(default)s)")
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--opset", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    original = tiny.load()
    tokens = data.encode(data.draw_attributes(args.clips, torch.Generator().manual_seed(args.seed)))
    noise = tiny.draw_noise(args.clips, args.seed)
    example = (tiny.with_coordinates(noise), torch.ones(args.clips), tokens)
    config = bw.CacheConfig(num_steps=args.steps, threshold=args.threshold, **SETTINGS)
    cached = bw.transform(original, config, example_args=example, example_kwargs={"return_dict": False})
    uncached_clips = generate(original, "torch, uncached", tokens, noise, args.steps)
    cached_clips = generate(cached, "torch, cached", tokens, noise, args.steps)

    manifest = bw.export(cached, args.out / "bundle", opset=args.opset)
    check, sizes = manifest.self_check, {name: file.bytes for name, file in manifest.files.items()}
    print(f"bundle: {', '.join(f'{name} {size / 2**20:.2f} MiB' for name, size in sizes.items())}")
    print(f"checked while it was written: {check['region_operators']} operators cached, none of them in reuse.onnx;", end=" ")
    print(f"steps {check['steps']}, error {check['largest_error']:.1g}")

    np.savez(args.out / "inputs.npz", noise=noise.numpy(), tokens=tokens.numpy(), steps=args.steps)
    deployed = run_without_torch(args.out)
    assert not deployed["importable"], f"the process was to lack {deployed['importable']}"
    print("generated in a process that cannot import torch, diffusers or onnx")
    print(f"torch:   {str(cached.report()).splitlines()[0]}\nwithout: {deployed['report'].splitlines()[0]}")

    clips = torch.from_numpy(np.load(args.out / "clips.npy"))
    same, against = quality.closeness(clips, cached_clips), quality.closeness(clips, uncached_clips)
    print(f"against the cached run in torch:   {same.psnr:6.1f} dB, SSIM {same.ssim:.4f} (100 dB: equal pictures)")
    print(f"against the uncached run in torch: {against.psnr:6.1f} dB, SSIM {against.ssim:.4f}")
    quality.animation({"uncached": uncached_clips, "cached": cached_clips, "without torch": clips}, args.out / "deployed_side_by_side.gif")
    print(f"the video: {args.out / 'deployed.gif'}; all three, row by row: {args.out / 'deployed_side_by_side.gif'}")


if __name__ == "__main__":
    main()
