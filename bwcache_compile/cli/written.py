"""Files that commands write."""

from __future__ import annotations

import os
from pathlib import Path

from bwcache_compile.cli.outcome import CommandError


def check_writable(path: Path) -> None:
    """Check before the work that a file can be written.

    Raises:
        CommandError: It cannot.
    """
    folder = path.absolute().parent
    if path.is_dir():
        raise CommandError(f"cannot write {path}: it is a directory")
    if not folder.is_dir():
        raise CommandError(f"cannot write {path}: {folder} is not a directory")
    probe = folder / f".{path.name}.{os.getpid()}"
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from error
