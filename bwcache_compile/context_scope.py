"""What a caller says about the calls of a block. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

from bwcache_compile.stepping import StepInfo


class Scope:
    """A `cache_context` block: what the caller says about the calls inside. `unused` is called at its end if none came.

    Attributes:
        info: What is said of the call.
        rows: What is said of each sample of its batch; None where samples are not named.
        called: Whether a call came.
    """

    def __init__(
        self,
        variable: ContextVar[Scope | None],
        info: StepInfo,
        unused: Callable[[StepInfo], None] | None,
        rows: tuple[StepInfo, ...] | None = None,
    ) -> None:
        """Say nothing before the block is entered."""
        self.info, self.rows, self.called = info, rows, False
        self._variable, self._unused = variable, unused

    def __enter__(self) -> None:
        """Begin the block."""
        self._token = self._variable.set(self)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the block, whether or not it failed."""
        self._variable.reset(self._token)
        if kind is None and not self.called and self._unused is not None:
            self._unused(self.info)


def row_group(row: str, group: str = "") -> str:
    """Name the group of contexts that a sample of a batch is."""
    return f"{group}/{row}" if group else row
