"""Say what a calibration records and how far it is."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from bwcache_compile.calibration.recording import Recorder


class Progress:
    """A progress bar over computed calls, where tqdm is installed; and one line about the recording's size."""

    def __init__(self, shown: bool, limit: float) -> None:
        """Show nothing before the first step is known; `limit` is what the calibration may cost, in full generations."""
        self._shown, self._limit = shown, limit
        self._bar: Any = None
        self._told = False

    def expect(self, calls: int) -> None:
        """Set the length of the bar once the calls of a full generation are known."""
        if self._bar is not None:
            self._bar.reset(total=round(self._limit * calls))
            self._bar.update(calls)

    def __enter__(self) -> Progress:
        """Open the bar."""
        if self._shown:
            try:
                from tqdm.auto import tqdm  # type: ignore[import-untyped,unused-ignore]
            except ModuleNotFoundError:
                return self
            self._bar = tqdm(desc="calibrating", unit="call", mininterval=1)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()

    def say(self, text: str) -> None:
        """Write a line to stderr, above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._shown:
            print(text, file=sys.stderr)

    def advance(self, recorder: Recorder) -> None:
        """Count one computed call; at the second step's first one, say what recording takes."""
        if not self._told and recorder.step == 1:
            self._told = True
            steps = recorder.num_steps or 50
            size, outputs = recorder.steps[0].bytes, sum(map(len, recorder.steps[0].outputs.values()))
            self.say(
                f"recording {size / 2**20:.2f} MiB per step on the host (latents and {outputs} output{'s' * (outputs != 1)});"
                f" {steps} steps take {steps * size / 2**20:.0f} MiB, and two generations are held at a time"
            )
        if self._bar is not None:
            self._bar.update()
