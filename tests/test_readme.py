"""What the README shows of exporting, and the page about pipelines, run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import bwcache_compile as bw
from benchmarks.readme import TABLES, section, table

ROOT = Path(bw.__file__).parents[1]


def run_as_one_script(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the Python of a page in an empty folder."""
    (folder / "script.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)))
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.mark.slow
def test_the_export_part_runs_as_one_script(tmp_path: Path) -> None:
    part = (ROOT / "README.md").read_text().split("### Export", 1)[1].split("\n## ", 1)[0]
    done = run_as_one_script(part, tmp_path)
    assert re.match(r"cond: \d+ computed, \d+ reused  ##[#.]{8}\n", done.stdout)
    assert (tmp_path / "bundle" / "guarded.onnx").is_file()


@pytest.mark.zoo
def test_the_page_about_pipelines_runs_as_one_script(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "pipelines.md").read_text()
    done = run_as_one_script(page, tmp_path)
    assert re.match(r"cond: \d+ computed, \d+ reused  ##[#.]+\nuncond: ", done.stdout)
    assert re.search(r"^cond 0 computed a new generation began: the first call None$", done.stdout, re.MULTILINE)
    assert re.search(r"^cond 3 reused step 2 allowed reuse up to step 4 None$", done.stdout, re.MULTILINE)
    assert (tmp_path / "bundle" / "manifest.json").is_file()
    logged = done.stderr.splitlines()
    shown = [
        line.strip().removesuffix("...")
        for line in page.splitlines()
        if line.startswith("    caching") or line.startswith("    transformer:")
    ]
    assert len(shown) == 2
    assert all(any(line.startswith(start) for line in logged) for start in shown)


@pytest.mark.parametrize("name", TABLES)
def test_figures_come_from_their_records(name: str) -> None:
    assert section(name).group(1) == table(name) + "\n"
