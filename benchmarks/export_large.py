"""What exporting a large model in bfloat16 takes: Wan 2.1's 1.3 B transformer with random weights.

    python benchmarks/export_large.py --out benchmarks/results/export_large.json

Reports the weights' size, the peak of memory beyond what the tools take for a model of a few kilobytes, and seconds. Needs about 10 GB
of memory and 3 GB of disk.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

sys.path.insert(0, str(Path(__file__).parents[1]))

import bwcache_compile as bw
from benchmarks.record import write_record

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "text_dim": 16, "freq_dim": 16},
    "1.3B": {"num_layers": 30, "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "text_dim": 4096, "freq_dim": 256},
}


def peak() -> int:
    """Return the largest resident memory of the process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def exported(size: str, folder: Path, guarded: bool) -> dict[str, Any]:
    """Export a model of one size and return what it took."""
    settings = SIZES[size]
    with torch.device("meta"):
        model = WanTransformer3DModel(**settings, in_channels=16, out_channels=16)
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.copy_(torch.empty_like(tensor).normal_(0, 0.02, generator=generator))
    inputs = {
        "hidden_states": torch.randn(1, 16, 1, 8, 8, dtype=torch.bfloat16),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 8, settings["text_dim"], dtype=torch.bfloat16),
        "return_dict": False,
    }
    cached = bw.transform(model, bw.CacheConfig(num_steps=8), example_kwargs=inputs)
    began = time.perf_counter()
    bw.export(cached, folder / size, guarded=guarded)
    seconds = time.perf_counter() - began
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return {"weights": weights, "peak": peak(), "seconds": round(seconds, 1), "parameters": sum(p.numel() for p in model.parameters())}


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1.3B")
    parser.add_argument("--guarded", action="store_true", help="write the guarded graph too")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tools = exported("tiny", Path(folder), asked.guarded)["peak"]
        found = exported(asked.size, Path(folder), asked.guarded)
    ratio = (found["peak"] - tools) / found["weights"]
    record = {
        "command": "python benchmarks/export_large.py" + " --guarded" * asked.guarded,
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "tools_bytes": tools,
        **found,
        "peak_beyond_tools_in_weights": round(ratio, 2),
    }
    print(json.dumps(record, indent=2))
    if asked.out:
        write_record(asked.out, record)


if __name__ == "__main__":
    main()
