"""What a drop-in costs beyond its graphs where launching is the bound, beside the caches of diffusers and cache-dit. Ratios within one run.

    python benchmarks/overhead.py --out benchmarks/results/overhead.json

Every contestant runs the same schedule of computed and reused steps. The ideal runs the plain model at the computed ones and
prologue and epilogue alone (a model whose blocks do nothing) at the reused ones. Contestants take turns, generation by
generation, and medians are compared. A rival that is not installed is left out, and the record says so.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, WanTransformer3DModel
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import bwcache_compile as bw
from benchmarks.record import write_record

STEPS = 14
MASK = (0, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0)
"""1 reuses: at most three steps in a row, which MagCache can be told to do as well."""

Call = Callable[[Tensor, Tensor, int], Tensor]


def wan(layers: int, width: int = 64) -> nn.Module:
    """Build a Wan model of one head; 27 parameters a block."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=1, attention_head_dim=width, in_channels=4, out_channels=4, text_dim=64,
        freq_dim=64, ffn_dim=4 * width, num_layers=layers, cross_attn_norm=True, rope_max_seq_len=64,
    )  # fmt: skip
    return model.eval().requires_grad_(False)


class Passed(nn.Module):
    """A block that does nothing."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return the first input."""
        return hidden_states


def plain(model: nn.Module, text: Tensor) -> Call:
    """Call a model as it is."""
    return lambda x, t, step: model(x, t, text, return_dict=False)[0]


def ours(layers: int, text: Tensor) -> Call:
    """Call a cached model."""
    cached = bw.transform(wan(layers), bw.CacheConfig(policy="static", steps_mask=MASK))

    def call(x: Tensor, t: Tensor, step: int) -> Tensor:
        with cached.cache_context("cond", step_index=step):
            return cached(x, t, text, return_dict=False)[0]

    return call


def first_block_cache(layers: int, text: Tensor) -> Call:
    """Call a model under diffusers' FirstBlockCache; its threshold forces each decision."""
    model: Any = wan(layers)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    hook = model.blocks[0]._diffusers_hook.get_hook("fbc_leader_block_hook")

    def call(x: Tensor, t: Tensor, step: int) -> Tensor:
        if step == 0:
            model._reset_stateful_cache()
        hook.threshold = 1e9 if MASK[step] else -1.0
        with model.cache_context("cond"):
            return model(x, t, text, return_dict=False)[0]

    return call


def mag_cache(layers: int, text: Tensor) -> Call:
    """Call a model under diffusers' MagCache; ratios of 1 skip as many steps as it may."""
    model: Any = wan(layers)
    model.enable_cache(
        MagCacheConfig(mag_ratios=[1.0] * STEPS, num_inference_steps=STEPS, threshold=1e9, max_skip_steps=3, retention_ratio=2 / STEPS)
    )

    def call(x: Tensor, t: Tensor, step: int) -> Tensor:
        if step == 0:
            model._reset_stateful_cache()
        with model.cache_context("cond"):
            return model(x, t, text, return_dict=False)[0]

    return call


def cache_dit(layers: int, text: Tensor) -> Call:
    """Call a model under cache-dit with the schedule as its mask of steps."""
    import cache_dit as library

    model: Any = wan(layers)
    config = library.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=2, residual_diff_threshold=1e9, num_inference_steps=STEPS,
        enable_separate_cfg=False, steps_computation_mask=[1 - reuses for reuses in MASK], steps_computation_policy="static",
    )  # fmt: skip
    library.enable_cache(model, cache_config=config)

    def call(x: Tensor, t: Tensor, step: int) -> Tensor:
        if step == 0:
            library.refresh_context(model, num_inference_steps=STEPS)
        return model(x, t, text, return_dict=False)[0]

    return call


def generation(call: Call, seconds: list[list[float]]) -> None:
    """Run one generation, and note each step's time."""
    x = torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(0))  # 32 tokens
    times = torch.linspace(999, 50, STEPS)
    for step in range(STEPS):
        began = time.perf_counter()
        x = x - 0.02 * call(x, times[step].reshape(1), step)
        seconds[step].append(time.perf_counter() - began)


def measure(layers: int, rounds: int) -> dict[str, Any]:
    """Compare everybody at one depth."""
    text = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(1))
    model, shell = wan(layers), wan(layers)
    shell.blocks = nn.ModuleList(Passed() for _ in range(layers))
    contestants: dict[str, Call] = {"plain": plain(model, text), "prologue and epilogue": plain(shell, text), "ours": ours(layers, text)}
    left_out = {}
    for name, make in (("FirstBlockCache", first_block_cache), ("MagCache", mag_cache), ("cache-dit", cache_dit)):
        if name == "cache-dit" and importlib.util.find_spec("cache_dit") is None:
            left_out[name] = "not installed"
            continue
        contestants[name] = make(layers, text)
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in range(STEPS)] for name in contestants}
    with torch.no_grad():
        for name, call in contestants.items():  # captures, and warms up
            for _ in range(2):
                generation(call, [[] for _ in range(STEPS)])
            del name
        for _ in range(rounds):
            for name, call in contestants.items():
                generation(call, seconds[name])
    median = {name: [statistics.median(times) for times in steps] for name, steps in seconds.items()}
    ideal = [median["prologue and epilogue" if reuses else "plain"][step] for step, reuses in enumerate(MASK)]
    rows = {}
    for name in contestants.keys() - {"plain", "prologue and epilogue"}:
        computed, reused = ([a - b for a, b, m in zip(median[name], ideal, MASK, strict=True) if m == kind] for kind in (0, 1))
        rows[name] = {
            "computed_step_us_beyond_plain": 1e6 * statistics.median(computed),
            "reused_step_us_beyond_prologue_and_epilogue": 1e6 * statistics.median(reused),
            "run_over_ideal": sum(median[name]) / sum(ideal),
        }
    return {
        "layers": layers,
        "parameters": len(list(model.parameters())),
        "plain_step_us": 1e6 * statistics.median(median["plain"]),
        "prologue_and_epilogue_us": 1e6 * statistics.median(median["prologue and epilogue"]),
        "drop_ins": dict(sorted(rows.items())),
        "left_out": left_out,
    }


def versions() -> dict[str, str]:
    """Name the versions of everybody who takes part."""
    found = {"python": platform.python_version(), "threads": str(torch.get_num_threads())}
    for package in ("torch", "diffusers", "cache-dit"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def main() -> None:
    """Measure, print a table, write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 44])
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    rows = [measure(layers, args.rounds) for layers in args.layers]
    for row in rows:
        print(
            f"{row['layers']} blocks, {row['parameters']} parameters: plain {row['plain_step_us']:.0f} us a step, prologue and epilogue"
            f" {row['prologue_and_epilogue_us']:.0f} us"
        )
        for name, drop_in in row["drop_ins"].items():
            print(
                f"  {name:16s} computed step {drop_in['computed_step_us_beyond_plain']:+8.0f} us, reused step"
                f" {drop_in['reused_step_us_beyond_prologue_and_epilogue']:+8.0f} us, run / ideal {drop_in['run_over_ideal']:.3f}"
            )
        for name, why in row["left_out"].items():
            print(f"  {name:16s} {why}")
    if args.out:
        record = {
            "command": "python benchmarks/overhead.py " + " ".join(sys.argv[1:]),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "versions": versions(),
            "machine": {"kind": platform.machine(), "cores": os.cpu_count()},
            "schedule": MASK,
            "rows": rows,
        }
        write_record(args.out, record)


if __name__ == "__main__":
    main()
