"""Find the line of a model's own code that an error, a stack or a traced node comes from."""

from __future__ import annotations

import inspect
import re
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_PACKAGE = str(Path(__file__).parents[1])
_INSTALLED = tuple({sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")})
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<name>.+)\n\s*(?P<code>.+)')


def _is_torch(file: str) -> bool:
    return "/torch/" in file.replace("\\", "/")


def class_files(modules: Iterable[Any]) -> frozenset[str]:
    """Return the files in which the classes of some modules are defined, torch's own left out."""
    found = set()
    for kind in {type(module) for module in modules}:
        try:
            found.add(inspect.getfile(kind))
        except (OSError, TypeError):  # made in a shell
            continue
    return frozenset(file for file in found if not _is_torch(file))


def source_line(frames: Iterable[traceback.FrameSummary], files: frozenset[str] = frozenset()) -> str:
    """Return the innermost line of the model's own code.

    Args:
        frames: A stack, innermost frame last.
        files: Those of the model's classes. Code that is not installed as a library is the model's own, too.

    Returns:
        The line; one of another library where none is the model's own, and empty where only torch and this package ran.
    """
    outside = [f for f in frames if not _is_torch(f.filename) and not f.filename.startswith((_PACKAGE, "<"))]
    own = [f for f in outside if f.filename in files or not f.filename.startswith(_INSTALLED)]
    found = (own or outside)[-1:]
    return f'{found[0].filename}:{found[0].lineno}, in {found[0].name}: "{found[0].line}"' if found else ""


def error_line(error: BaseException, files: frozenset[str] = frozenset()) -> str:
    """Return the line of the model's own code that an exception comes from; Dynamo's carry the stack that they stopped in."""
    stopped = getattr(error, "real_stack", None) or ()
    return source_line(stopped, files) or source_line(traceback.extract_tb(error.__traceback__), files)


def node_line(node: Any, files: frozenset[str] = frozenset()) -> str:
    """Return the line of the model's own code that a traced node comes from."""
    found = _FRAME.finditer(node.meta.get("stack_trace") or "")
    return source_line([traceback.FrameSummary(m["file"], int(m["line"]), m["name"], line=m["code"]) for m in found], files)
