"""Every Python block of docs/testing.md runs, and fails with the message that stands below it, if one does."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest

import bwcache_compile as bw

PAGE = Path(bw.__file__).parents[1] / "docs" / "testing.md"


def blocks() -> list[tuple[str, str | None]]:
    """Return each Python block, with the text block that follows it."""
    fences = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    followed = zip(fences, [*fences[1:], ("", "")], strict=True)
    return [(code, text if kind == "text" else None) for (language, code), (kind, text) in followed if language == "python"]


def test_every_block_does_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    failed: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.onnx's own
        for code, message in blocks():
            compiled = compile(code, str(PAGE), "exec")
            if message is None:
                exec(compiled, names)
                continue
            failed.append(code)
            with pytest.raises(AssertionError) as error:
                exec(compiled, names)
            assert re.sub(r"\d\.\d+(e-\d+)?", "#", str(error.value)) == re.sub(r"\d\.\d+(e-\d+)?", "#", message.rstrip("\n"))
    assert len(failed) == 4
    assert "enable_cache(FirstBlockCacheConfig(" in failed[-1], "a cache that was patched into a model is seen to be lost"
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "passes"}
