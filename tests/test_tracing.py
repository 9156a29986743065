"""One thread traces at a time, and torch says nothing meanwhile."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import bwcache_compile as bw
from bwcache_compile.ir.tracing import tracing
from tests.models import OneStream, TwoStream

READS_A_RATE = """
import torch, bwcache_compile as bw
from tests.models import OneStream

class Rated(OneStream):
    def forward(self, x, t, rate):
        x = super().forward(x, t)
        return x * 2 if rate.tolist()[0] > 0 else x

example = (*OneStream().example(), torch.tensor([1.0]))
print(bw.transform(Rated().eval(), bw.CacheConfig(num_steps=3), example_args=example).plan.notes)
"""


def test_a_capture_that_succeeds_in_the_end_prints_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", READS_A_RATE], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert "the values of rate are constants of the graph" in done.stdout


def test_other_threads_may_print_while_one_traces(capsys: pytest.CaptureFixture[str]) -> None:
    stream = sys.stderr
    with tracing(), ThreadPoolExecutor(1) as pool:
        pool.submit(print, "from elsewhere", file=sys.stderr).result()
        print("from here", file=sys.stderr)
        kept = sys.stderr
    assert sys.stderr is stream
    print("afterwards", file=kept)
    assert capsys.readouterr().err == "from elsewhere\nafterwards\n"


def test_loggers_that_the_user_opened_stay_open() -> None:
    opened, usual = logging.getLogger("torch._dynamo"), logging.getLogger("torch.export")
    level = opened.level
    opened.setLevel(logging.DEBUG)
    try:
        with tracing():
            assert (opened.level, usual.level) == (logging.DEBUG, logging.CRITICAL)
    finally:
        opened.setLevel(level)
    assert usual.level == logging.NOTSET


def test_captures_beside_an_export_keep_their_module_names(tmp_path: Path) -> None:
    model = OneStream().eval().requires_grad_(False)
    cached = bw.transform(model, bw.CacheConfig(num_steps=3, threshold=0), example_args=model.example())
    captured = threading.Event()

    def export() -> int:
        count = 0
        while not captured.is_set() or not count:
            bw.export(cached, tmp_path / "bundle")
            count += 1
        return count

    with ThreadPoolExecutor(1) as pool:
        exporting = pool.submit(export)
        try:
            for i in range(4):
                other = TwoStream(2 + i % 2, 2).eval()
                found = bw.find_blocks(other, example_args=other.example()).blocks
                assert [block.name for block in found] == [f"double_blocks.{k}" for k in range(2 + i % 2)] + [
                    "single_blocks.0",
                    "single_blocks.1",
                ]
        finally:
            captured.set()
        assert exporting.result() > 0
