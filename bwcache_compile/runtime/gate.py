"""Keep runs and captures of one model apart: tracing puts hooks on every module of the process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class CaptureGate:
    """Lets many threads run programs at the same time, or one thread capture while no program runs.

    Attributes:
        lock: Held by whoever reads or writes the table of programs.
    """

    def __init__(self) -> None:
        """Nothing runs yet."""
        self.lock = threading.RLock()
        self._idle = threading.Condition(self.lock)
        self._running: dict[int, int] = {}
        self._waiting = 0

    def enter(self) -> None:
        """Keep captures out until `leave`. A capture that already waits goes first, unless this thread runs a program already."""
        thread = threading.get_ident()
        with self.lock:
            if self._waiting and thread not in self._running:
                self._idle.wait_for(lambda: not self._waiting)
            self._running[thread] = self._running.get(thread, 0) + 1

    def leave(self) -> None:
        """Let captures in again once no program runs."""
        thread = threading.get_ident()
        with self.lock:
            self._running[thread] -= 1
            if not self._running[thread]:
                del self._running[thread]
            if self._waiting:
                self._idle.notify_all()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Keep captures out while active."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def wait_until_idle(self) -> None:
        """Wait until no other thread runs a program. The caller holds the lock, which is released while waiting."""
        mine = self._running.get(threading.get_ident(), 0)
        self._waiting += 1
        try:
            self._idle.wait_for(lambda: sum(self._running.values()) == mine)
        finally:
            self._waiting -= 1
            self._idle.notify_all()
