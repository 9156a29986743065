"""How a command ends: its exit code, and its errors as one line."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback as tracebacks
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from bwcache_compile.errors import CacheWarning, first_line

if TYPE_CHECKING:
    from bwcache_compile.cli.screen import Screen

FAILED, USAGE, INTERRUPTED = 1, 2, 130


class CommandError(Exception):
    """What a command could not do, in one line; exit code 1."""

    code = FAILED


class UsageError(CommandError):
    """The command line names something that is not there, or that does not fit; exit code 2."""

    code = USAGE


def error_text(error: BaseException) -> str:
    """Say what went wrong in one line; evidence that an error of this package lists below it follows on lines of its own."""
    if isinstance(error, CommandError):
        return str(error)
    if isinstance(error.__cause__, OSError):
        return first_line(error)
    if type(error).__module__.startswith("bwcache_compile."):
        return "\n  ".join([str(error).strip(), *getattr(error, "__notes__", ())])
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {first_line(error)} (--traceback shows where)"


def _drop_output() -> None:
    """Leave nothing for Python to write at its end to a pipe that nobody reads any more, or to a full disk."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):  # a stream of a test has no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def outcome(as_json: bool, traceback: bool) -> Iterator[Screen]:
    """Yield what a command writes to, and turn whatever it raises into a line on stderr and an exit code.

    Standard output takes the command's result alone: what a model or a library prints goes to stderr, and so do the warnings of this
    package. With `as_json` a failure is a JSON document too.

    Raises:
        typer.Exit: With the exit code, if the command failed.
    """
    from bwcache_compile.cli.screen import Screen  # rich takes a while to import

    screen = Screen(sys.stdout, sys.stderr, as_json)
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", CacheWarning)
            warnings.showwarning = lambda message, *_: screen.warn(str(message))
            yield screen
            screen.flush()
    except typer.Exit:
        raise
    except BrokenPipeError:
        _drop_output()
    except KeyboardInterrupt:
        screen.say("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except (typer.BadParameter, SystemExit):
        raise
    except BaseException as error:
        code = error.code if isinstance(error, CommandError) else FAILED
        text = error_text(error)
        if traceback:
            tracebacks.print_exc(file=sys.stderr)
        screen.say(f"error: {text}", style="red")
        if as_json:
            _show_failure(screen, error, text, code)
        _drop_output()
        raise typer.Exit(code) from None


def _show_failure(screen: Screen, error: BaseException, text: str, code: int) -> None:
    """Write the failure as JSON, where nothing was written before and there is somewhere to write to."""
    if not screen.shown:
        with contextlib.suppress(OSError):
            screen.show({"error": {"kind": type(error).__name__, "message": text, "exit_code": code}}, "")
            screen.flush()
