"""The fixture of the pytest plugin, in a test suite of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import bwcache_compile as bw

ROOT = Path(bw.__file__).parents[1]

SUITE = """
import pytest

from tests.models import OneStream

made = []


def test_passes(cached_model):
    cached = cached_model(OneStream(depth=2).eval(), num_steps=4, example_args=OneStream().example())
    made.append(cached)
    assert len(cached.plan.blocks) == 2


def test_closed():
    assert "closed" in repr(made[0])


def test_fails(cached_model):
    cached_model(OneStream(depth=2).eval(), num_steps=4)
    cached = cached_model(OneStream(depth=2).eval(), num_steps=4, example_args=OneStream().example())
    assert len(cached.plan.blocks) == 3
"""


def test_a_failing_test_says_where_the_graphs_are(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["bwcache_compile.testing.fixtures"]\n')
    (tmp_path / "test_suite.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'base'}", "."]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "1 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    folder = tmp_path / "base" / "test_fails0" / "passes"
    section = done.stdout.split("graphs before and after each pass", 1)[1]
    assert "not captured yet): not written: nothing is captured yet" in section
    assert f"2 blocks cached, 1 program): {folder / '1'}" in section
    assert (folder / "1" / "05_insert_cache.diff.txt").read_text().startswith("@@ insert_cache\n+copy_")
