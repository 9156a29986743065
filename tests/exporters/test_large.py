"""A model whose weights do not fit into one protocol buffer (2 GB): it exports, runs, and is not copied about meanwhile."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import bwcache_compile as bw

EXPORT = """
import json, resource, sys
import torch
import bwcache_compile as bw
from tests.models import OneStream

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def weigh(model):
    return sum(p.numel() * p.element_size() for p in model.parameters())

small = OneStream().eval()  # what the tools themselves take, whatever the model
bw.export(bw.transform(small, bw.CacheConfig(num_steps=8), example_args=small.example()), sys.argv[1] + "/small", guarded=True)
tools = peak()
model = OneStream(depth=int(sys.argv[2]), width=int(sys.argv[3])).eval().requires_grad_(False)
cached = bw.transform(model, bw.CacheConfig(num_steps=8), example_args=model.example())
built = peak()
manifest = bw.export(cached, sys.argv[1] + "/large", guarded=True)
print(json.dumps({"weights": weigh(model), "tools": tools, "built": built, "peak": peak(), "steps": manifest.self_check["steps"]}))
"""


@pytest.mark.slow
def test_weights_beyond_two_gigabytes(tmp_path: Path) -> None:
    """17 blocks of 128 MiB. The check runs the pair and the guarded graph, each with all the weights."""
    command = [sys.executable, "-c", EXPORT, str(tmp_path), "17", "4096"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(bw.__file__).parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["weights"] > 2**31
    assert (tmp_path / "large" / "weights.bin").stat().st_size > 2**31
    assert found["steps"] == "##..#."
    assert (found["peak"] - found["tools"]) / found["weights"] <= 2.2
