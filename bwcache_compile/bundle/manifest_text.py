"""A manifest as text with a checksum over every byte of it. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

CHECKSUM = "sha256"


def write_text(content: Mapping[str, Any]) -> str:
    """Return a manifest as text; its last entry is the SHA-256 of the text with that entry left empty."""
    entries = {key: value for key, value in content.items() if key != CHECKSUM}
    text = json.dumps({**entries, CHECKSUM: ""}, indent=1, allow_nan=False) + "\n"
    return _filled(text, hashlib.sha256(text.encode()).hexdigest())


def _filled(text: str, checksum: str) -> str:
    head, _, tail = text.rpartition('""')
    return f'{head}"{checksum}"{tail}'


def read_text(data: bytes) -> dict[str, Any]:
    """Return what a manifest says, without its checksum.

    Raises:
        ValueError: It is no JSON object, or a byte of it is not what was written.
    """
    text = data.decode("utf-8")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, got {repr(content)[:60]}")
    recorded = content.pop(CHECKSUM, None)
    if not isinstance(recorded, str) or not recorded or text.count(f'"{recorded}"') != 1:
        raise ValueError("the checksum is missing")
    empty = text.replace(f'"{recorded}"', '""')
    if hashlib.sha256(empty.encode()).hexdigest() != recorded or not empty.endswith(f'"{CHECKSUM}": ""\n}}\n'):
        raise ValueError("checksum mismatch: the manifest was changed after export")
    return content
