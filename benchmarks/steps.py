"""What a computed and a reused step cost against the plain model, and what transforming costs. Ratios within one run.

    python benchmarks/steps.py --out benchmarks/results/steps_cpu.json

Machines are noisy: the contestants of each ratio take turns, call by call, and medians are compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import bwcache_compile as bw
from benchmarks.record import write_record


def wan(layers: int, width: int = 512) -> nn.Module:
    """Build a Wan model of heads of 64 channels; without layers it is prologue and epilogue alone."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=width // 64, attention_head_dim=64, in_channels=16, out_channels=16, text_dim=256,
        freq_dim=256, ffn_dim=4 * width, num_layers=layers, cross_attn_norm=True, rope_max_seq_len=128,
    )  # fmt: skip
    return model.eval().requires_grad_(False)


def inputs(frames: int = 4, height: int = 32, width: int = 32) -> dict[str, Any]:
    """Make a call's arguments; the default has 1024 tokens."""
    return {
        "hidden_states": torch.randn(1, 16, frames, height, width),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 32, 256),
        "return_dict": False,
    }


def take_turns(contestants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Time each contestant once a round, in turn; return the median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    with torch.no_grad():
        for _ in range(rounds):
            for name, call in contestants.items():
                began = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def measure_steps(layers: int, rounds: int, compiled: bool) -> dict[str, float]:
    """Compare a computed step with the plain model, and a reused one with prologue and epilogue alone."""
    model, shell, call = wan(layers), wan(0), inputs()
    cached = bw.transform(model, bw.CacheConfig(num_steps=2, threshold=0.1), example_kwargs=call)
    if compiled:
        cached.compile()
        model_call, shell_call = torch.compile(model), torch.compile(shell)
        cached.warm_up((), call)
    else:
        model_call, shell_call = model, shell
    fresh = cached.init_state((), call)
    with torch.no_grad():
        model_call(**call)
        shell_call(**call)
        _, after = cached.functional_step((), call, fresh)
    reusing = dataclasses.replace(after, cursor=dataclasses.replace(after.cursor, reuse_until=after.step))
    medians = take_turns(
        {
            "plain": lambda: model_call(**call),
            "computed": lambda: cached.functional_step((), call, fresh),
            "shell": lambda: shell_call(**call),
            "reused": lambda: cached.functional_step((), call, reusing),
        },
        rounds,
    )
    return {
        "tokens": 1024,
        "width": 512,
        "layers": layers,
        "plain_ms": 1e3 * medians["plain"],
        "reused_ms": 1e3 * medians["reused"],
        "computed_over_plain": medians["computed"] / medians["plain"],
        "reused_over_shell": medians["reused"] / medians["shell"],
        "reused_over_plain": medians["reused"] / medians["plain"],
    }


def measure_transform(layers: int) -> dict[str, float]:
    """Compare transform, without its eager forwards, with torch.export alone."""
    model, call = wan(layers, width=64), inputs(frames=1, height=16, width=16)
    with torch.no_grad():
        model(**call)
        began = time.perf_counter()
        model(**call)
        forward = time.perf_counter() - began
        export, transform = [], []
        for _ in range(3):
            gc.collect()  # neither is to pay for the other's garbage
            began = time.perf_counter()
            torch.export.export(model, (), call, strict=False)
            export.append(time.perf_counter() - began)
            gc.collect()
            began = time.perf_counter()
            bw.transform(model, bw.CacheConfig(num_steps=50), example_kwargs=call)
            transform.append(time.perf_counter() - began)
    ours = statistics.median(transform) - 2 * forward  # the reference run and the check of the capture
    return {
        "layers": layers,
        "export_s": statistics.median(export),
        "transform_s": ours,
        "forward_s": forward,
        "transform_over_export": ours / statistics.median(export),
    }


def peak_memory(action: str) -> None:
    """Print, as JSON, the peak of resident memory over one forward or one transform (in a process of its own)."""
    model, call = wan(8, width=1024), inputs(frames=1, height=16, width=16)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with torch.no_grad():
        model(**call)
    if action == "transform":
        bw.transform(model, bw.CacheConfig(num_steps=50), example_kwargs=call)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"weights": weights, "peak": peak}))


def measure_memory() -> dict[str, float]:
    """Compare the peak memory of a process that transforms with one that only runs the model."""
    peaks = {}
    for action in ("forward", "transform"):
        done = subprocess.run([sys.executable, __file__, "--peak", action], capture_output=True, text=True, check=True)
        peaks[action] = json.loads(done.stdout.splitlines()[-1])
    extra = peaks["transform"]["peak"] - peaks["forward"]["peak"]
    weights = peaks["forward"]["weights"]
    return {"weights_mib": weights / 2**20, "extra_mib": extra / 2**20, "extra_over_weights": extra / weights}


def main() -> None:
    """Measure, print a table, write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--peak", choices=["forward", "transform"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        peak_memory(args.peak)
        return
    result = {
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()},
        "eager": measure_steps(args.layers, args.rounds, compiled=False),
        "compiled": measure_steps(args.layers, args.rounds, compiled=True),
        "transform": [measure_transform(layers) for layers in (10, 20, 40)],
        "memory": measure_memory(),
    }
    for kind in ("eager", "compiled"):
        row: Any = result[kind]
        print(
            f"{kind}: computed / plain {row['computed_over_plain']:.3f}, reused / shell {row['reused_over_shell']:.2f},"
            f" reused / plain {row['reused_over_plain']:.4f}"
        )
    rows: Any = result["transform"]
    for row in rows:
        seconds = f"export {row['export_s']:.2f} s, transform {row['transform_s']:.2f} s"
        print(f"{row['layers']} blocks: {seconds}, ratio {row['transform_over_export']:.2f}")
    memory: Any = result["memory"]
    print(f"transform holds {memory['extra_over_weights']:.3f} of the weights ({memory['weights_mib']:.0f} MiB) beyond a forward")
    if args.out:
        write_record(args.out, result)


if __name__ == "__main__":
    main()
