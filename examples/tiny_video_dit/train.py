"""Train the tiny video model with flow matching. The exact command is in this folder's README."""

from __future__ import annotations

import argparse
import csv
import os
import time
from pathlib import Path

import data
import torch
from model import WEIGHTS, build, with_coordinates
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

SIGMA_FLOOR = 0.15


def learning_rate(step: int, total: int, warmup: int, decay: int) -> float:
    """Factor of the peak rate: linear warm-up, flat, then linear to zero over the last `decay` steps."""
    return min(1.0, (step + 1) / warmup, (total - step) / decay)


def draw_batch(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw noisy clips, their sigmas, condition tokens (one in ten dropped) and the clean clips."""
    attributes = data.draw_attributes(batch, generator)
    clip = data.render(attributes, generator)
    tokens = data.encode(attributes)
    tokens[torch.rand(batch, generator=generator) < 0.1] = 0
    noise = torch.randn(clip.shape, generator=generator)
    sigma = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch  # stratified
    mix = sigma.view(-1, 1, 1, 1, 1)
    return torch.lerp(clip, noise, mix), sigma, tokens, clip


def save_atomically(value: object, path: Path) -> None:
    """Write a checkpoint so that an interruption never leaves half a file."""
    torch.save(value, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def draw_loss(log: Path, picture: Path) -> None:
    """Plot the logged loss."""
    import matplotlib.pyplot as plt

    rows = [(int(step), float(loss)) for step, loss in csv.reader(log.open())]
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    axis.semilogy(*zip(*rows, strict=True))
    axis.set(xlabel="step", ylabel="loss, mean of 50 steps")
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def main() -> None:
    """Train, resuming from the run folder's checkpoint if there is one, and write the averaged weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder for the checkpoint and the loss log")
    parser.add_argument("--steps", type=int, default=15500)
    parser.add_argument("--decay", type=int, default=5000, help="steps of the final linear decay")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where the float16 weights are written")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model = build().train()
    matrices = [p for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2]
    others = [p for n, p in model.named_parameters() if not (n.startswith("blocks.") and p.ndim == 2)]
    optimizers = (
        torch.optim.Muon(matrices, lr=4e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0),
    )
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    first = 0
    checkpoint = args.run / "checkpoint.pt"
    args.run.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        average = saved["average"]
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first = saved["step"]

    compiled = torch.compile(model)
    log = (args.run / "loss.csv").open("a", newline="")
    writer = csv.writer(log)
    window, started = [], time.time()
    for step in range(first, args.steps):
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * learning_rate(step, args.steps, 200, args.decay)
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)  # so that a resumed run sees the same data
        noisy, sigma, tokens, clip = draw_batch(args.batch, generator)
        # the CPU's fused attention is several times slower backwards than the plain formula at this size
        with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            predicted = compiled(with_coordinates(noisy), sigma * 1000, tokens, return_dict=False)[0]
        # the error of the velocity (noisy - clean) / sigma, bounded where sigma vanishes
        error = (predicted.float() - clip) / sigma.clamp(min=SIGMA_FLOOR).view(-1, 1, 1, 1, 1)
        loss = error.square().mean()
        if not loss.isfinite():
            raise FloatingPointError(f"loss is {loss.item()} at step {step}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        rate = min(0.999, (step + 1) / (step + 10))
        for name, value in model.state_dict().items():
            average[name].lerp_(value, 1 - rate)
        window.append(loss.item())
        if (step + 1) % 50 == 0:
            writer.writerow([step + 1, f"{sum(window) / len(window):.5f}"])
            log.flush()
            print(
                f"step {step + 1}  loss {sum(window) / len(window):.4f}  {(time.time() - started) / (step + 1 - first):.3f} s/step",
                flush=True,
            )
            window.clear()
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            optimizer_states = [optimizer.state_dict() for optimizer in optimizers]
            save_atomically({"model": model.state_dict(), "average": average, "optimizers": optimizer_states, "step": step + 1}, checkpoint)
            temporary = args.weights.with_suffix(".tmp")
            save_file({name: value.half().contiguous() for name, value in average.items()}, temporary)
            os.replace(temporary, args.weights)
    log.close()
    draw_loss(args.run / "loss.csv", args.run / "loss.png")


if __name__ == "__main__":
    main()
