"""What a command writes: its result to stdout, as text or as one JSON document; progress and warnings to stderr."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from bwcache_compile.printing import plain

SLOW = 2.0
"""Seconds after which a command says what it is doing, and between two such lines, where stderr is no terminal."""
_WIDE = 200


class Screen:
    """Where a command writes.

    Attributes:
        shown: Whether the result was written.
        warnings: What was warned of so far.
    """

    def __init__(self, out: TextIO, err: TextIO, as_json: bool) -> None:
        """Write results to `out` and everything else to `err`."""
        self._out, self._as_json = out, as_json
        self._errors = Console(file=err, highlight=False, markup=False, soft_wrap=True)
        self.shown = False
        self.warnings: list[str] = []

    def say(self, line: str, style: str = "") -> None:
        """Write a line to stderr."""
        self._errors.print(line, style=style or None)

    def warn(self, text: str) -> None:
        """Write a warning to stderr, and keep it for the JSON document."""
        self.warnings.append(text)
        self.say(f"warning: {text}", style="yellow")

    def show(self, document: Mapping[str, Any], *parts: str | Table) -> None:
        """Write the result: the document as JSON, or the parts one below the other."""
        self.shown = True
        if self._as_json:
            complete = {**document, "warnings": [*document.get("warnings", ()), *self.warnings]}
            self._out.write(json.dumps(plain(complete), indent=2, allow_nan=False) + "\n")
            return
        console = Console(file=self._out, highlight=False, markup=False, soft_wrap=True)
        if not console.is_terminal:
            console = Console(file=self._out, highlight=False, markup=False, soft_wrap=True, width=_WIDE)
        for part in parts:
            console.print(part)

    def flush(self) -> None:
        """Write out what is buffered, so that a full disk or a closed pipe is noticed here."""
        self._out.flush()

    @contextlib.contextmanager
    def progress(self, what: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        """Show on stderr that something is going on; yields what counts one of `total`.

        On a terminal it is a line that goes when the work is done; elsewhere a line, written only for what takes longer than `SLOW`.
        """
        if self._errors.is_terminal:
            columns = [SpinnerColumn(), TextColumn("{task.description}"), *((BarColumn(), MofNCompleteColumn()) if total else ())]
            with Progress(*columns, TimeElapsedColumn(), console=self._errors, transient=True) as bar:
                task = bar.add_task(what, total=total)
                yield lambda: bar.advance(task)
            return
        lines = _Lines(lambda text: self.say(text), what, total)
        try:
            yield lines.advance
        finally:
            lines.stop()


class _Lines:
    """Progress where there is no terminal: a line after `SLOW` seconds, further ones as a count goes on."""

    def __init__(self, say: Callable[[str], None], what: str, total: int | None) -> None:
        self._say, self._what, self._total, self._done = say, what, total, 0
        self._last = time.monotonic()
        self._timer = threading.Timer(SLOW, lambda: say(f"{what} ..."))
        self._timer.daemon = True
        self._timer.start()

    def advance(self) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._last > 5 * SLOW:
            self._last = now
            self._say(f"{self._what}: {self._done}" + (f" of {self._total}" if self._total else ""))

    def stop(self) -> None:
        self._timer.cancel()


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], numbers: Sequence[str] = ()) -> Table:
    """Lay rows out under column names; the columns in `numbers` are aligned to the right."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        made.add_column(name, justify="right" if name in numbers else "left", no_wrap=name in numbers, overflow="fold")
    for row in rows:
        made.add_row(*map(str, row))
    return made


def shape_text(value: Mapping[str, Any]) -> str:
    """Print a tensor of a JSON document on one line: `name float32[1, 4]`."""
    if value["shape"] is None:
        return str(value["name"])
    return f"{value['name']} {value['dtype']}[{', '.join(map(str, value['shape']))}]"
