"""How close two sets of clips are, and pictures that show it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Closeness:
    """Mean PSNR in dB and mean SSIM over all frames; identical frames count as 100 dB."""

    psnr: float
    ssim: float


def pixels(clips: Tensor) -> np.ndarray:
    """Turn clips float32[B, 3, F, H, W] in [-1, 1] into uint8[B, F, H, W, 3]."""
    return ((clips + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).numpy()


def closeness(clips: Tensor, reference: Tensor) -> Closeness:
    """Compare clips with a reference, frame by frame, as the eight-bit pictures that they are shown as."""
    psnrs, ssims = [], []
    ours_all, theirs_all = (np.concatenate(list(pixels(c))) for c in (clips, reference))
    for ours, theirs in zip(ours_all, theirs_all, strict=True):
        same = np.array_equal(ours, theirs)
        psnrs.append(100.0 if same else peak_signal_noise_ratio(theirs, ours, data_range=255))
        ssims.append(structural_similarity(theirs, ours, data_range=255, channel_axis=-1))
    return Closeness(float(np.mean(psnrs)), float(np.mean(ssims)))


def _save(image: Image.Image, path: Path, **options: object) -> None:
    temporary = path.with_name(path.stem + ".tmp" + path.suffix)
    image.save(temporary, **options)
    temporary.replace(path)


def contact_sheet(rows: dict[str, Tensor], path: Path, scale: int = 3) -> None:
    """Write a PNG: for each clip one row per entry of `rows`, its frames from left to right."""
    arrays = [pixels(clips) for clips in rows.values()]
    gap = 2
    lines = []
    for clip in range(arrays[0].shape[0]):
        for array in arrays:
            lines.append(np.concatenate(list(array[clip]), axis=1))
        lines.append(np.full((gap, lines[-1].shape[1], 3), 255, np.uint8))
    image = Image.fromarray(np.concatenate(lines[:-1], axis=0))
    _save(image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST), path)


def animation(rows: dict[str, Tensor], path: Path, scale: int = 4) -> None:
    """Write a GIF that plays forth and back: one column per clip, one row per entry of `rows`."""
    arrays = [pixels(clips) for clips in rows.values()]
    frames = []
    for frame in range(arrays[0].shape[1]):
        grid = np.concatenate([np.concatenate(list(array[:, frame]), axis=1) for array in arrays], axis=0)
        image = Image.fromarray(grid)
        frames.append(image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST))
    frames += frames[-2:0:-1]
    _save(frames[0], path, save_all=True, append_images=frames[1:], duration=120, loop=0)
