"""How long Inductor takes for the graphs of a deeper model: plain, block by block, and cached.

    python benchmarks/compile_time.py --out benchmarks/results/compile_time.json

Each contestant is compiled in a process of its own with empty caches. Reported are the processor seconds of this process and of
the C++ compiler, which runs in one thread, from the first call to the end of the first computed and the first reused step, less
those of the same calls without a compiler (capture, the model itself). Processor seconds are what other work on the machine does
not change.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from operator import methodcaller
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import bwcache_compile as bw
from benchmarks.record import write_record

MASK = (0, 1, 0, 1)


def wan(depth: int) -> nn.Module:
    """Build a Wan model of small blocks."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=64,
        freq_dim=64, ffn_dim=256, num_layers=depth, cross_attn_norm=True, rope_max_seq_len=64,
    )  # fmt: skip
    return model.eval().requires_grad_(False)


def inputs(step: int) -> dict[str, Any]:
    """Return the inputs of a step."""
    generator = torch.Generator().manual_seed(step)
    return {
        "hidden_states": torch.randn(1, 4, 2, 8, 8, generator=generator),
        "encoder_hidden_states": torch.ones(1, 8, 64),
        "timestep": torch.tensor([900.0 - 100 * step]),
        "return_dict": False,
    }


def _plain(model: Any, compiled: bool) -> Any:
    return torch.compile(model) if compiled else model


def _by_block(model: Any, compiled: bool) -> Any:
    if compiled:
        model.compile_repeated_blocks(fullgraph=True)
    return model


def _cached(capture: str, compiles: Callable[[Any], Any]) -> Callable[[Any, bool], Any]:
    def make(model: Any, compiled: bool) -> Any:
        options: dict[str, Any] = {"capture": capture, "example_kwargs": inputs(0)}
        cached = bw.transform(model, policy="static", steps_mask=MASK, **options)
        return compiles(cached) or cached if compiled else cached

    return make


CONTESTANTS: dict[str, Callable[[Any, bool], Any]] = {
    "plain, whole": _plain,
    "plain, block by block": _by_block,
    "cached": _cached("whole", methodcaller("compile")),
    "cached, blocks alone": _cached("whole", methodcaller("compile_repeated_blocks")),
    "cached by region": _cached("region", methodcaller("compile")),
    "cached as opaque": _cached("opaque", methodcaller("compile")),
}


def processor_seconds() -> float:
    """Return the processor seconds of this process and of those that it waited for."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def seconds_of(contestant: str, depth: int) -> float:
    """Return the processor seconds that compiling adds to the first two steps."""
    taken = []
    for compiled in (False, True):
        model = wan(depth)
        start = processor_seconds()
        made = CONTESTANTS[contestant](model, compiled)
        with torch.no_grad():
            for step in range(2):
                made(**inputs(step))
        taken.append(processor_seconds() - start)
    return taken[1] - taken[0]


def main() -> None:
    """Compile every contestant at every depth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[10, 20, 40])
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS))
    parser.add_argument("--one", nargs=2, metavar=("CONTESTANT", "DEPTH"), help="measure one in this process")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.one:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        print(json.dumps(seconds_of(args.one[0], int(args.one[1]))))
        return
    record: dict[str, Any] = {"command": "python benchmarks/compile_time.py", "torch": torch.__version__, "processor_seconds": {}}
    for contestant in args.contestants:
        rows: dict[str, float] = {}
        for depth in args.depths:
            with tempfile.TemporaryDirectory() as empty:
                command = [sys.executable, __file__, "--one", contestant, str(depth)]
                environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": empty, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
                done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            rows[str(depth)] = round(json.loads(done.stdout.splitlines()[-1]), 1)
        record["processor_seconds"][contestant] = {
            **rows,
            "deepest / shallowest": round(rows[str(args.depths[-1])] / rows[str(args.depths[0])], 2),
        }
        print(contestant, record["processor_seconds"][contestant], flush=True)
        if args.out is not None:
            write_record(args.out, record)


if __name__ == "__main__":
    main()
