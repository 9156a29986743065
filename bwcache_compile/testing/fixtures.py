"""A pytest fixture for cached models, which a test suite asks for in its top `conftest.py`.

pytest_plugins = ["bwcache_compile.testing.fixtures"]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from bwcache_compile.api import transform
from bwcache_compile.errors import ExportError, StateError
from bwcache_compile.runtime import CachedModel

_MADE = pytest.StashKey[list[CachedModel]]()


@pytest.fixture
def cached_model(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., CachedModel]]:
    """Return `transform`. The cached models that it makes are closed after the test.

    If the test fails, the graphs before and after each pass are written to `tmp_path / "passes"`, and the report says so.
    """
    made = request.node.stash[_MADE] = []

    def make(*args: Any, **kwargs: Any) -> CachedModel:
        made.append(transform(*args, **kwargs))
        return made[-1]

    yield make
    for cached in made:
        cached.close()


def _dumped(made: Sequence[CachedModel], folder: Path) -> str:
    """Write the passes' graphs of each model; return a line for each."""
    lines = []
    for i, cached in enumerate(made):
        place = folder / "passes" if len(made) == 1 else folder / "passes" / str(i)
        try:
            cached.dump_passes(place)
            lines.append(f"{cached!r}: {place}")
        except (ExportError, StateError) as error:
            lines.append(f"{cached!r}: not written: {error}")
    return "\n".join(lines)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Add a section to the report of a failed test that used `cached_model`."""
    report: Any = yield
    made = item.stash.get(_MADE, [])
    if made and report.when == "call" and report.failed:
        report.sections.append(("graphs before and after each pass", _dumped(made, item.funcargs["tmp_path"])))  # type: ignore[attr-defined]
    return report
