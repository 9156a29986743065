"""What torch.compile made of a cached model is saved to a file, and another process with empty caches compiles nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bwcache_compile as bw
from tests.models import OneStream

ROOT = Path(__file__).parents[2]


def compiled(method: str) -> None:
    """Compile a cached model."""
    model = OneStream().eval()
    cached = bw.transform(model, policy="static", steps_mask=(0, 1))
    getattr(cached, method)()
    cached.warm_up(model.example())


def run(task: str, method: str, path: Path) -> None:
    """Do one task of the test, in a process of its own."""
    from torch._dynamo.utils import counters

    if task == "load":
        torch.compiler.load_cache_artifacts(path.read_bytes())
    compiled(method)
    if task == "save":
        saved = torch.compiler.save_cache_artifacts()
        assert saved is not None
        path.write_bytes(saved[0])
    print(json.dumps({name: counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss")}))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "graphs"), [("compile", 2), ("compile_repeated_blocks", 1)])
def test_another_process_compiles_nothing(method: str, graphs: int, tmp_path: Path) -> None:
    counted = {}
    for task in ("save", "load"):
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / task), "PYTHONPATH": str(ROOT)}
        code = "import sys, pathlib; from tests.runtime.test_mega_cache import run; run(*sys.argv[1:3], pathlib.Path(sys.argv[3]))"
        command = [sys.executable, "-W", "ignore", "-c", code, task, method, str(tmp_path / "artifacts")]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
        counted[task] = json.loads(done.stdout.splitlines()[-1])
    assert counted == {"save": {"hit": 0, "miss": graphs}, "load": {"hit": graphs, "miss": 0}}
