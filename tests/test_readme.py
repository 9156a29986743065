"""What the README shows of exporting runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import bwcache_compile as bw
from benchmarks.readme import TABLES, section, table

ROOT = Path(bw.__file__).parents[1]


def test_the_export_part_runs_as_one_script(tmp_path: Path) -> None:
    part = (ROOT / "README.md").read_text().split("### Export", 1)[1].split("\n## ", 1)[0]
    (tmp_path / "script.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", part, re.DOTALL)))
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.match(r"cond: \d+ computed, \d+ reused  ##[#.]{8}\n", done.stdout)
    assert (tmp_path / "bundle" / "guarded.onnx").is_file()


@pytest.mark.parametrize("name", TABLES)
def test_figures_come_from_their_records(name: str) -> None:
    assert section(name).group(1) == table(name) + "\n"
