"""Write what each pass changed as text files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from bwcache_compile.errors import ExportError
from bwcache_compile.ir.graph_text import GraphDiff
from bwcache_compile.new_folder import new_folder

_OURS = re.compile(r"(\d\d_)?\w+\.(before|after|diff)\.txt")
"""Names of the files that are written, which a later dump may replace."""


def write_pass_files(diffs: Mapping[str, GraphDiff], directory: str | Path) -> tuple[Path, ...]:
    """Write three files for each pass: `01_canonicalize.before.txt`, `.after.txt` and `.diff.txt`; all of them or none.

    Args:
        diffs: By the pass's name, in the order in which they ran. "whole", which is no pass, gets no number.
        directory: Made, or replaced if it is empty or holds nothing but an earlier dump.

    Returns:
        The files, in order.

    Raises:
        ExportError: The folder holds something else, or cannot be written to. It is as it was.
    """
    target = Path(directory).resolve()
    texts = {}
    for number, (name, diff) in enumerate(diffs.items(), 1):
        stem = name if name == "whole" else f"{number:02}_{name}"
        for kind, text in (("before", diff.before), ("after", diff.after), ("diff", diff.text)):
            texts[f"{stem}.{kind}.txt"] = text + "\n" if text else ""
    try:
        others = sorted(path.name for path in target.iterdir() if not _OURS.fullmatch(path.name)) if target.exists() else []
        if others:
            raise ExportError(f"{target} contains {', '.join(others[:3])}, which is not a dump of passes. Choose another directory.")
        with new_folder(target) as folder:
            for name, text in texts.items():
                (folder / name).write_text(text)
    except OSError as error:
        raise ExportError(f"cannot write {target}: {error}.\n  Choose another directory, or free some space there.") from error
    return tuple(target / name for name in texts)
