"""Write a folder whole or not at all. Needs no torch."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a folder to write to; at the end it replaces `target`, or is removed if there was an error.

    Raises:
        OSError: The folder cannot be written to. What is at `target` is as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    folder, replaced = place / "new", place / "old"
    try:
        folder.mkdir()
        yield folder
        try:
            if target.exists():
                os.rename(target, replaced)
            os.rename(folder, target)
        except BaseException:
            if replaced.exists() and not target.exists():
                os.rename(replaced, target)
            raise
    finally:
        shutil.rmtree(place)
