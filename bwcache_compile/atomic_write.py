"""Write a file whole or not at all. Needs no torch."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def new_file(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a file to write to; at the end it replaces `path`, or is removed if there was an error.

    Raises:
        OSError: The folder does not exist or cannot be written to. What is at `path` is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a file; text in UTF-8. Where that fails, what was there before is there still, and nothing else is left.

    Raises:
        OSError: The folder does not exist or cannot be written to.
    """
    with new_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
