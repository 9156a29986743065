"""The command line `bwcache`; see `docs/cli.md`. Needs typer and rich; each command imports what it runs, when it runs."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line on `sys.argv` and exit.

    The exit code is 0 for success, 1 for a failure, 2 for a wrong command line, and 130 after Ctrl-C.
    """
    try:
        from bwcache_compile.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(f'error: the command line needs {error.name}: pip install "bwcache-compile[cli]".', file=sys.stderr)
        sys.exit(1)
    app(prog_name="bwcache")
