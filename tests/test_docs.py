"""The pages of the documentation: every Python block runs, and every link leads somewhere.

A comment `<!-- run ... -->` holds code that runs and is not shown; `<!-- not run: why -->` before a block leaves it out.
A block that a block of text follows fails with that text, numbers aside.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bwcache_compile as bw

ROOT = Path(bw.__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")])
BLOCK = re.compile(
    r"<!-- run\n(?P<hidden>.*?)-->|(?P<left_out><!-- not run: [^\n]+ -->\n+)?^```python\n(?P<shown>.*?)^```$"
    r"(?:\n+^```text\n(?P<fails>.*?)^```$)?",
    re.DOTALL | re.MULTILINE,
)
LONG = ("deployment.md", "pipelines.md", "testing.md")
"""Pages that take a minute between them."""
RUN_PAGES = """
import os, re, sys, tempfile, traceback
sys.path.insert(0, os.getcwd())
failed = False

def fails(code, message, names):
    said = "it does not fail"
    try:
        exec(compile(code, "a block that fails", "exec"), names)
    except AssertionError as error:
        said = str(error)
    found, shown = (re.sub(r"\\d\\.\\d+(e-\\d+)?", "#", text.strip()) for text in (said, message))
    assert found == shown, said

for page in sys.stdin.read().split("\\0"):
    name, _, code = page.partition("\\n")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        sys.modules.pop("tests.docs_pipeline", None)  # each page has a pipeline of its own
        try:
            exec(compile(code, name, "exec"), {"__name__": name, "fails": fails})
        except BaseException:
            print(name, traceback.format_exc(), file=sys.stderr)
            failed = True
sys.exit(failed)
"""


def code_of(page: Path) -> str:
    """Return the code of a page, each line where it stands on the page, so that errors name the right one."""
    text, code = page.read_text(), ""
    for block in BLOCK.finditer(text):
        if not block["left_out"]:
            group = "shown" if block["hidden"] is None else "hidden"
            code += "\n" * (text.count("\n", 0, block.start(group)) - code.count("\n"))
            code += block[group] if block["fails"] is None else f"fails({block[group]!r}, {block['fails']!r}, globals())\n"
    return code


@pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_block_runs(long: bool) -> None:
    """All pages in one process, each in an empty folder: importing the libraries is what takes time."""
    chosen = [page for page in PAGES if page.parent != ROOT and (page.name in LONG) == long]
    pages = [f"{page.relative_to(ROOT)}\n{code}" for page in chosen if (code := code_of(page)).strip()]
    assert len(pages) > 1
    done = subprocess.run([sys.executable, "-c", RUN_PAGES], input="\0".join(pages), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    zensical = pytest.importorskip("zensical", reason="needs the extra [docs]")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    (tmp_path / "bwcache_compile").symlink_to(ROOT / "bwcache_compile")
    command = [sys.executable, "-m", zensical.__name__, "build", "--strict"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "api" / "index.html").read_text()
    for name in ("transform", "calibrate", "export", "load", "config.CacheConfig"):
        assert f'id="bwcache_compile.{name}"' in page
