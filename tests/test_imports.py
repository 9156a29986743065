"""Imports go down only, and importing the package needs torch alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bwcache_compile

NAME = "bwcache_compile"
ROOT = Path(bwcache_compile.__file__).parent
LAYERS = (
    {"errors"},
    {"graph_io", "report", "size_expressions", "source_lines", "stepping", "tracing", "work_share"},
    {"config", "contexts", "known_sizes", "policies", "sizes"},
    {"examples", "layout", "tree_paths"},
    {"program"},
    {"compare", "dataflow", "graph_text", "inline", "known", "verify"},
    {"capture", "passes", "runtime", "exporters"},
    {"api"},
)
ONE_PART = {"config", "policies"}
"""Settings name policies, and policies read settings."""
FREE_AMONG_THEMSELVES = next(layer for layer in LAYERS if "dataflow" in layer)
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
HEAVY = (
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "tensorrt",
    "matplotlib",
    "skimage",
    "PIL",
    "safetensors",
)


def part(dotted: str) -> str:
    """Return the part of the package that a dotted name inside it belongs to."""
    return dotted.split(".")[1] if "." in dotted else ""


def imported(source: str) -> set[str]:
    """Return the parts of the package that a source imports, wherever in the source."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {part(alias.name) for alias in node.names if alias.name.split(".")[0] == NAME}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == NAME:
                found |= {alias.name for alias in node.names}
            elif (node.module or "").startswith(NAME + "."):
                found.add(part(str(node.module)))
    return found


def layer(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


def objections(owner: str, source: str) -> list[str]:
    """Return the imports of a source that do not go down."""
    wrong = []
    for other in sorted(imported(source) - {owner}):
        if layer(other) > layer(owner):
            wrong.append(f"{owner} imports {other}, which is above it")
        elif layer(other) == layer(owner) and owner not in FREE_AMONG_THEMSELVES and not {owner, other} <= ONE_PART:
            wrong.append(f"{owner} imports {other}, which is beside it")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_down(path: Path) -> None:
    owner = path.relative_to(ROOT).with_suffix("").parts[0]
    assert objections(owner, path.read_text()) == []


def test_every_file_has_a_layer() -> None:
    owners = {path.relative_to(ROOT).with_suffix("").parts[0] for path in FILES}
    assert owners == set().union(*LAYERS)


@pytest.mark.parametrize(
    ("owner", "source", "reason"),
    [
        ("passes", "from bwcache_compile.runtime.state import CacheState", "passes imports runtime, which is beside it"),
        ("runtime", "from bwcache_compile import passes", "runtime imports passes, which is beside it"),
        ("exporters", "def f():\n    import bwcache_compile.capture.capture", "exporters imports capture, which is beside it"),
        ("config", "from bwcache_compile.ir.program import Block", "config imports program, which is above it"),
        ("verify", "from bwcache_compile import api", "verify imports api, which is above it"),
    ],
)
def test_the_check_sees_an_import_that_goes_up(owner: str, source: str, reason: str) -> None:
    assert objections(owner, source) == [reason]


def test_importing_needs_torch_alone() -> None:
    code = f"import sys, {NAME}; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.strip() == "[]"
