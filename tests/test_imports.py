"""Imports go down only, in the order of docs/code_map.md; what a deployment needs imports no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import bwcache_compile

NAME = "bwcache_compile"
ROOT = Path(bwcache_compile.__file__).parent
BASE = {
    "atomic_write",
    "errors",
    "graph_io",
    "new_folder",
    "printing",
    "report",
    "size_expressions",
    "stepping",
    "clock",
    "context",
    "context_scope",
    "context_store",
    "contexts",
    "context_methods",
    "step_events",
    "step_trace",
    "policies",
    "graph_settings",
    "config_checks",
    "config",
}
"""Files and packages that everything may import, and that import nothing else of ours."""
MAY_IMPORT = {
    **dict.fromkeys(BASE, BASE),
    "ir": BASE,
    "capture": BASE | {"ir"},
    "passes": BASE | {"ir"},
    "runtime": BASE | {"ir"},
    "region": BASE | {"ir", "runtime"},
    "opaque": BASE | {"ir", "runtime", "region"},
    "calibration": BASE | {"ir", "runtime"},
    "bundle": BASE,
    "exporters": BASE | {"ir", "bundle"},
    "html_report": BASE | {"ir", "passes", "runtime", "calibration"},
    "api_arguments": BASE | {"ir", "passes", "runtime"},
    "toolchains": BASE | {"ir", "capture", "passes", "runtime", "opaque", "api_arguments"},
    "api": BASE | {"ir", "capture", "passes", "runtime", "region", "opaque", "api_arguments", "toolchains"},
    "api_export": BASE | {"ir", "passes", "runtime", "region", "opaque", "bundle", "exporters"},
    "pipelines": BASE | {"ir", "passes", "runtime", "calibration", "api", "api_arguments"},
    "cli": BASE | {"ir", "runtime", "bundle", "exporters", "calibration"},
    "__main__": {"cli"},
    "testing": BASE | {"ir", "capture", "passes", "runtime", "bundle", "api"},
}
RUNNERS = "bundle/runners"
"""Runs graphs with torch's own tensors, so it may import `ir`."""
LIBRARIES = {
    "jinja2": ("html_report",),
    "onnx": ("exporters/onnx",),
    "onnx_ir": ("exporters/onnx", "exporters/tensorrt", "testing/onnx_graphs"),
    "onnxscript": ("exporters/onnx",),
    "onnxruntime": ("exporters/onnx", RUNNERS),
    "openvino": (RUNNERS,),
    "tensorrt": ("exporters/tensorrt", RUNNERS),
    "typer": ("cli",),
    "rich": ("cli",),
    "matplotlib": ("cli",),
    "expecttest": ("testing/graphs",),
    "pytest": ("testing/fixtures",),
}
"""Which folders import an optional library."""
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
HEAVY = ("diffusers", "transformers", "peft", "accelerate", *LIBRARIES, "skimage", "PIL", "safetensors")


def where(path: Path) -> str:
    """Return a file's path in the package, without its suffix."""
    return path.relative_to(ROOT).with_suffix("").as_posix()


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def statements(node: ast.AST, everywhere: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports of a source: all of them, or those that run when the file is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif everywhere or not (is_for_types_only(child) or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))):
            yield from statements(child, everywhere)


def imported(source: str, everywhere: bool = True) -> set[str]:
    """Return the dotted names of the modules that a source imports, and of what it imports from the package."""
    found: set[str] = set()
    for node in statements(ast.parse(source), everywhere):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            assert node.level == 0, "imports are absolute"
            ours = str(node.module).split(".")[0] == NAME
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if ours else {str(node.module)}
    return found


def objections(owner: str, source: str) -> list[str]:
    """Return what a file of the package must not import.

    Args:
        owner: The file, as `where` names it.
        source: Its text.
    """
    part = owner.split("/")[0]
    allowed = MAY_IMPORT[part] | {part} | ({"ir"} if owner.startswith(RUNNERS) else set())
    others = {name.split(".")[1] for name in imported(source) if name.startswith(NAME + ".")}
    wrong = [f"{owner} imports {other}" for other in sorted(others - allowed)]
    for name in sorted({name.split(".")[0] for name in imported(source)}):
        if name in LIBRARIES and not owner.startswith(LIBRARIES[name]):
            wrong.append(f"{owner} imports {name}")
    free_of_torch = part in BASE or (part == "bundle" and not owner.startswith(RUNNERS))
    at_once = {name.split(".")[0] for name in imported(source, everywhere=False)}
    if free_of_torch and "torch" in at_once:
        wrong.append(f"{owner} imports torch when it is imported")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=where)
def test_imports_go_down(path: Path) -> None:
    assert objections(where(path), path.read_text()) == []


def test_every_part_has_a_rule() -> None:
    assert {where(path).split("/")[0] for path in FILES} == set(MAY_IMPORT)


def test_no_file_imports_itself_through_others() -> None:
    modules = {f"{NAME}.{where(path).removesuffix('/__init__').replace('/', '.')}": path for path in FILES}
    needed = {}
    for module, path in modules.items():
        names = imported(path.read_text(), everywhere=False)
        needed[module] = {name if name in modules else name.rpartition(".")[0] for name in names} & modules.keys() - {module}
    TopologicalSorter(needed).prepare()  # raises CycleError with the files of a circle


@pytest.mark.parametrize(
    ("owner", "source", "reason"),
    [
        ("passes/x", "from bwcache_compile.runtime.state import CacheState", "passes/x imports runtime"),
        ("runtime/x", "from bwcache_compile import passes", "runtime/x imports passes"),
        ("exporters/x", "def f():\n    import bwcache_compile.capture", "exporters/x imports capture"),
        ("config", "from bwcache_compile.ir.program import Block", "config imports ir"),
        ("ir/verify", "from bwcache_compile import api", "ir/verify imports api"),
        ("bundle/session", "from bwcache_compile.ir.layout import in_order", "bundle/session imports ir"),
        ("bundle/session", "if True:\n    import torch.fx", "bundle/session imports torch when it is imported"),
        ("exporters/check", "def f():\n    import onnx_ir", "exporters/check imports onnx_ir"),
    ],
)
def test_the_rule_sees_a_wrong_import(owner: str, source: str, reason: str) -> None:
    assert objections(owner, source) == [reason]


def test_importing_needs_no_optional_library() -> None:
    code = f"import sys, {NAME}.testing; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.strip() == "[]"


def test_help_imports_neither_torch_nor_what_only_a_command_needs() -> None:
    code = (
        "import sys; from bwcache_compile.cli import main; sys.argv = ['bwcache', '--help']\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code, sorted({'torch', 'numpy', 'onnxruntime', 'diffusers', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.splitlines()[-1] == "0 []"
    assert "inspect" in done.stdout


def test_bundles_are_read_without_torch() -> None:
    modules = [f"{NAME}.{where(path).replace('/', '.')}" for path in FILES if where(path).startswith("bundle/")]
    free = [name for name in modules if ".runners." not in name or name.endswith(".ort")]
    code = f"import sys; sys.modules['torch'] = None\nfor name in {free!r}: __import__(name)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)
